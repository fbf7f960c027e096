"""The machinery every op shares: registry, dispatch, memory, device facts. Knows no op by name."""
