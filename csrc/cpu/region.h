// For code inside a level's target region. Nothing inline of the standard library may be used
// there: the linker keeps one copy of such a function, and it must not be one that needs
// instructions another machine lacks.
#pragma once

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

// Kept out of line: compiled once however many callers it has.
#define APART static __attribute__((noinline, unused))
