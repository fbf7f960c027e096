"""The measured choice: which backend serves a call, and with which config a kernel runs.

One table answers both. It is asked in this order: what this process has measured, the user's cache
(FASTLLM_CACHE_DIR), the table shipped for this device, and then the caller's own heuristic. An
ordinary call never measures: `fastllm tune`, `fastllm.tune(model, inputs)` and FASTLLM_TUNE=on do.

    facts.py    what a measurement holds for: device, versions, kernel sources
    store.py    files that several processes write, and that may be broken
    table.py    the layers of the table, and what is learned
    routes.py   an op's calls -> the backend that won
    tunable.py  a kernel's sizes -> the config that won
    search.py   candidates against one another
    jobs.py     what there is to measure: the ops' cases, recorded calls, tunables
    follow.py   several ranks: rank 0 decides
"""
