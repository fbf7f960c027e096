// AdamW, SGD with momentum and Lion over many tensors: one pass over memory for gradient scaling,
// decay, moments and update, with states in float32, bfloat16 or 8-bit codes.

#include "cpu/kernels/optim_codes.inl"

// A task's share of the elements, and the room in which what is not float32 is worked on.
constexpr i64 kPiece = 64 << 10;
constexpr i64 kRoom = 4 * kScaled;

struct alignas(64) Room {
  float param[kRoom], grad[kRoom], state[3][kRoom];
};

// How far ahead lines are asked for: four or five streams at once are more than a core's own
// prefetcher keeps up with, and it stops at each page.
constexpr i64 kAhead = 1024, kLater = 4 * kRoom;

// n values of any type as floats, with zeros up to the next whole vector.
template <class T>
INLINE void widen(const T* from, float* to, i64 n) {
  i64 i = 0;
  for (; i + W <= n; i += W) {
    if (i * i64(sizeof(T)) % 64 == 0) prefetch(from + i, kAhead, 0);
    store(to + i, load(from + i));
  }
  if (i < n) store(to + i, keep(load(from + i, int(n - i)), int(n - i)));
}
template <class T>
INLINE void narrow(const float* from, T* to, i64 n) {
  i64 i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i), int(n - i));
}
APART void read_as(int type, const void* from, i64 at, float* to, i64 n) {
  with_type(type, [&](auto* t) {
    widen(static_cast<decltype(t)>(const_cast<void*>(from)) + at, to, n);
  });
}
APART void round_as(int type, void* to, i64 at, const float* from, i64 n) {
  with_type(type, [&](auto* t) { narrow(from, static_cast<decltype(t)>(to) + at, n); });
}
APART void round_stochastic(bf16* to, const float* from, i64 n, uint32_t key, i64 at) {
  Random random(key, at);
  i64 i = 0;
  for (; i + W <= n; i += W, random.skip())
    store_stochastic(to + i, load(from + i), random.bits<true>(), W);
  if (i < n) store_stochastic(to + i, load(from + i, int(n - i)), random.bits<true>(), n - i);
}

template <class C>
APART void decode(const uint8_t* codes, const float* scales, float* x, i64 n) {
  for (i64 i = 0; i < n; i += kScaled)
    decode_block<C>(codes + i, scales[i / kScaled], x + i, least(kScaled, n - i));
}
template <class C>
APART void encode(const float* x, uint8_t* codes, float* scales, i64 n, uint32_t key, i64 at) {
  for (i64 i = 0; i < n; i += kScaled)
    encode_block<C>(x + i, codes + i, scales + i / kScaled, least(kScaled, n - i), key, at + i);
}

template <class F>
INLINE void with_code(int kept, const F& call) {
  if (kept == kSignedOctaves) call(SignedOctaves{});
  if (kept == kOctaves) call(Octaves{});
  if (kept == kFp8) call(Fp8{});
  if (kept == kFp8Square) call(Fp8Square{});
}

INLINE void read_state(const Tensor& t, int k, i64 at, float* x, i64 n) {
  if (t.store[k] == kHalf) return read_as(kBFloat16, t.state[k], at, x, n);
  with_code(t.store[k], [&](auto code) {
    decode<decltype(code)>(static_cast<const uint8_t*>(t.state[k]) + at,
                           t.scale[k] + at / kScaled, x, n);
  });
}
// The two moments of an element take different halves of its random bits.
INLINE void write_state(const Tensor& t, int k, i64 at, const float* x, i64 n) {
  if (t.store[k] == kHalf)
    return round_stochastic(static_cast<bf16*>(t.state[k]) + at, x, n, t.key + uint32_t(k), at);
  with_code(t.store[k], [&](auto code) {
    encode<decltype(code)>(x, static_cast<uint8_t*>(t.state[k]) + at, t.scale[k] + at / kScaled, n,
                           t.key, at);
  });
}

// Parameters and gradients of a type, states in float32.
template <class T>
struct Held {
  T* param;
  const T* grad;
  float* state[3];
};
using Floating = Held<float>;

// m / (sqrt(v) * unbias + eps).
INLINE Vec over_root(Vec first, Vec second, Vec unbias, Vec eps) {
  const Vec size = fma(quick_root(second), unbias, eps);
  if (__builtin_expect(!plain(size), 0))
    return quotient(first, fma(root(second), unbias, eps));
  return quick_quotient(first, size);
}

// m and v are the moving averages of g and g^2; p -= step * m / (sqrt(v) * root + eps).
template <bool Decay, bool Max, class T>
APART void adam(const Held<T>& f, const Coefficients& c, i64 n) {
  T* p = f.param;
  float *m = f.state[0], *v = f.state[1], *most = f.state[2];
  const T* g = f.grad;
  const Vec scale = set1(c.grad), l2 = set1(c.l2), decay = set1(c.decay), mix1 = set1(c.mix1);
  const Vec keep2 = set1(c.keep2), mix2 = set1(c.mix2), unbias = set1(c.root), eps = set1(c.eps);
  const Vec step = set1(-c.step);
  sweep(n, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
    prefetch(p + i, kAhead, k), prefetch(g + i, kAhead, k);
    prefetch(m + i, kAhead, k), prefetch(v + i, kAhead, k);
    Vec param = get(p + i, lanes), grad = get(g + i, lanes) * scale;
    if (Decay) grad = fma(l2, param, grad);
    param = param * decay;
    Vec first = get(m + i, lanes);
    first = fma(mix1, grad - first, first);
    Vec second = fma(grad * grad, mix2, get(v + i, lanes) * keep2);
    put<false>(m + i, first, lanes);
    put<false>(v + i, second, lanes);
    if (Max) {
      second = larger(second, get(most + i, lanes));
      put<false>(most + i, second, lanes);
    }
    put<false>(p + i, fma(step, over_root(first, second, unbias, eps), param), lanes);
  });
}

template <bool Decay, bool Momentum, class T>
APART void sgd(const Held<T>& f, const Coefficients& c, i64 n) {
  T* p = f.param;
  float* b = f.state[0];
  const T* g = f.grad;
  const Vec scale = set1(c.grad), l2 = set1(c.l2), step = set1(-c.step);
  const Vec momentum = set1(c.momentum), damp = set1(c.damp), keep_part = set1(c.decay);
  sweep(n, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
    prefetch(p + i, kAhead, k), prefetch(g + i, kAhead, k);
    if (Momentum) prefetch(b + i, kAhead, k);
    const Vec param = get(p + i, lanes);
    Vec grad = get(g + i, lanes) * scale;
    if (Decay) grad = fma(l2, param, grad);
    if (Momentum) {
      const Vec buffer = fma(damp, grad, get(b + i, lanes) * momentum);
      put<false>(b + i, buffer, lanes);
      grad = c.nesterov ? fma(momentum, buffer, grad) : buffer;
    }
    put<false>(p + i, fma(step, grad, param * keep_part), lanes);
  });
}

// p -= lr * sign(beta1 m + (1 - beta1) g), and m is the average of g with beta2.
template <class T>
APART void lion(const Held<T>& f, const Coefficients& c, i64 n) {
  T* p = f.param;
  float* m = f.state[0];
  const T* g = f.grad;
  const Vec scale = set1(c.grad), decay = set1(c.decay), mix1 = set1(c.mix1), mix2 = set1(c.mix2);
  const Vec step = set1(-c.step);
  sweep(n, [&](auto lanes, i64 i, int k) INLINE_LAMBDA {
    prefetch(p + i, kAhead, k), prefetch(g + i, kAhead, k), prefetch(m + i, kAhead, k);
    const Vec grad = get(g + i, lanes) * scale, old = get(m + i, lanes);
    const Vec along = fma(mix1, grad - old, old);
    // sign(0) is 0, and NaN stays NaN
    const Words one = ((Words)along.v & 0x80000000u) | 0x3f800000u;
    const Words none = (Words)(along.v == zero().v) | (Words)(along.v != along.v);
    const Vec sign = {(Floats)pick_words(none, (Words)along.v, one)};
    put<false>(m + i, fma(mix2, grad - old, old), lanes);
    put<false>(p + i, fma(step, sign, get(p + i, lanes) * decay), lanes);
  });
}

template <class T>
INLINE void update(int kind, const Held<T>& f, const Coefficients& c, i64 n) {
  if (kind == kAdam) {
    if (f.state[2])
      c.l2 != 0.0f ? adam<true, true>(f, c, n) : adam<false, true>(f, c, n);
    else
      c.l2 != 0.0f ? adam<true, false>(f, c, n) : adam<false, false>(f, c, n);
  } else if (kind == kSgd) {
    if (f.state[0])
      c.l2 != 0.0f ? sgd<true, true>(f, c, n) : sgd<false, true>(f, c, n);
    else
      c.l2 != 0.0f ? sgd<true, false>(f, c, n) : sgd<false, false>(f, c, n);
  } else {
    lion(f, c, n);
  }
}

// Two 8-bit moments of whole blocks.
struct Coded {
  uint8_t* code[2];
  float* scale[2];
  uint32_t key;
  i64 at;
};

// adam() from codes to codes: a group of blocks is updated with its moments in the cache, and
// encoded once their scales are known. n is a multiple of kScaled.
template <class M, class V, bool Decay, class T>
APART void adam_coded(const Held<T>& f, const Coded& s, const Coefficients& c, i64 n) {
  alignas(64) float first_room[kRoom], second_room[kRoom];
  static_assert(kRoom == kDealt, "a group's numbers are dealt together");
  const Vec grad_scale = set1(c.grad), l2 = set1(c.l2), decay = set1(c.decay), mix1 = set1(c.mix1);
  const Vec mix2 = set1(c.mix2), unbias = set1(c.root), eps = set1(c.eps);
  const Vec step = set1(-c.step);
  const float keep1 = (1.0f - c.mix1) * (1.0f / M::kUnit), keep2 = c.keep2 * (1.0f / V::kUnit);
  float *scale1 = s.scale[0], *scale2 = s.scale[1];
  for (i64 group = 0; group < n; group += kRoom) {
    const i64 size = least(n - group, kRoom);
    T* p = f.param + group;
    const T* g = f.grad + group;
    uint8_t *code1 = s.code[0] + group, *code2 = s.code[1] + group;
    for (i64 block = 0; block < size; block += kScaled) {
      const i64 at = (group + block) / kScaled;
      const Vec unit1 = set1(scale1[at] * keep1), unit2 = set1(scale2[at] * keep2);
      Words top1 = words(0), top2 = words(0);
      for (i64 i = block; i < block + kScaled; i += W) {
        Vec param = load(p + i), grad = load(g + i) * grad_scale;
        if (Decay) grad = fma(l2, param, grad);
        const Vec first = fma(M::get(code1 + i), unit1, grad * mix1);
        const Vec second = fma(grad * grad, mix2, V::get(code2 + i) * unit2);
        store(first_room + i, first);
        store(second_room + i, second);
        top1 = larger_bits(top1, magnitude(first));
        top2 = larger_bits(top2, (Words)second.v);
        const Vec size = fma(rough_root(second), unbias, eps);
        store(p + i, fma(step, first * rough_inverse(size), param * decay));
      }
      scale1[at] = scale_of<M>(top1);
      scale2[at] = scale_of<V>(top2);
    }
    Random random(s.key, s.at + group);
    for (i64 block = 0; block < size; block += kScaled) {
      const i64 at = (group + block) / kScaled;
      const Coder<M> one(scale1[at]);
      const Coder<V> two(scale2[at]);
      for (i64 i = block; i < block + kScaled; i += W, random.skip()) {
        // memory is idle here: lines of a later group come while this one is encoded
        prefetch(p + i, kLater, int(i / W % 4));
        prefetch(g + i, kLater, int(i / W % 4));
        if (i % 64 == 0) prefetch(code1 + i, kLater, 0), prefetch(code2 + i, kLater, 0);
        const Words m = one.code(load(first_room + i), random);
        const Words v = two.code(load(second_room + i), random);
        store_bytes(code1 + i, (Lane32)m);
        store_bytes(code2 + i, (Lane32)v);
      }
    }
  }
}

template <class M, class V, class T>
INLINE void adam_coded(const Held<T>& f, const Coded& s, const Coefficients& c, i64 n) {
  c.l2 != 0.0f ? adam_coded<M, V, true>(f, s, c, n) : adam_coded<M, V, false>(f, s, c, n);
}

INLINE bool both(const Tensor& t, int first, int second) {
  return t.store[0] == first && t.store[1] == second;
}
// Whether whole blocks go from codes to codes.
INLINE bool coded(int kind, const Tensor& t) {
  return kind == kAdam && !t.state[2] &&
         (both(t, kSignedOctaves, kOctaves) || both(t, kFp8, kFp8Square));
}

// The whole blocks of the first n elements at `at`, where a tensor is coded(); returns how many
// elements that were.
template <class T>
INLINE i64 update_coded(const Tensor& t, const Held<T>& f, i64 at, i64 n) {
  n = n / kScaled * kScaled;
  if (n == 0) return 0;
  const Coded s = {{static_cast<uint8_t*>(t.state[0]) + at, static_cast<uint8_t*>(t.state[1]) + at},
                   {t.scale[0] + at / kScaled, t.scale[1] + at / kScaled}, t.key, at};
  t.store[0] == kSignedOctaves ? adam_coded<SignedOctaves, Octaves>(f, s, *t.use, n)
                               : adam_coded<Fp8, Fp8Square>(f, s, *t.use, n);
  return n;
}

// n elements at `at` through decoded states.
INLINE void update_decoded(int kind, const Tensor& t, Floating f, i64 at, i64 n, Room& room) {
  for (int k = 0; k < 3; ++k) {
    if (!t.state[k]) continue;
    f.state[k] = static_cast<float*>(t.state[k]) + at;
    if (t.store[k] != kPlain) read_state(t, k, at, f.state[k] = room.state[k], n);
  }
  update(kind, f, *t.use, n);
  for (int k = 0; k < 3; ++k)
    if (t.state[k] && t.store[k] != kPlain) write_state(t, k, at, f.state[k], n);
}

// As much of n elements at `at` as needs no room: parameters and gradients of one type, states in
// float32 or coded(). Returns how many elements that were.
template <class T>
INLINE i64 update_in_place(int kind, const Tensor& t, i64 at, i64 n) {
  Held<T> f{static_cast<T*>(t.param) + at, static_cast<const T*>(t.grad) + at, {}};
  if (coded(kind, t)) return update_coded(t, f, at, n);
  for (int k = 0; k < 3; ++k) {
    if (t.state[k] && t.store[k] != kPlain) return 0;
    f.state[k] = t.state[k] ? static_cast<float*>(t.state[k]) + at : nullptr;
  }
  update(kind, f, *t.use, n);
  return n;
}

// The elements [from, to) of a tensor; from is a multiple of kRoom. What cannot be updated in memory
// passes through the room.
INLINE void piece(int kind, const Tensor& t, i64 from, i64 to) {
  if (!t.master && !t.stochastic && t.param_type == t.grad_type) {
    with_type(t.param_type, [&](auto* type) {
      from += update_in_place<std::remove_pointer_t<decltype(type)>>(kind, t, from, to - from);
    });
  }
  if (from == to) return;
  Room room;
  for (i64 at = from; at < to; at += kRoom) {
    const i64 n = least(kRoom, to - at);
    Floating f{};
    f.param = t.master ? t.master + at : static_cast<float*>(t.param) + at;
    if (!t.master && t.param_type != kFloat32)
      read_as(t.param_type, t.param, at, f.param = room.param, n);
    f.grad = static_cast<const float*>(t.grad) + at;
    if (t.grad_type != kFloat32) {
      read_as(t.grad_type, t.grad, at, room.grad, n);
      f.grad = room.grad;
    }
    const i64 done = coded(kind, t) ? update_coded(t, f, at, n) : 0;
    const Floating rest = {f.param + done, f.grad + done, {}};
    if (done < n) update_decoded(kind, t, rest, at + done, n - done, room);
    if (!t.master && t.param_type == kFloat32) continue;
    if (t.stochastic)
      round_stochastic(static_cast<bf16*>(t.param) + at, f.param, n, mixed(t.key), at);
    else
      round_as(t.param_type, t.param, at, f.param, n);
  }
}

// Deals the elements of all tensors out to tasks, in order, and calls body(tensor, from, to) for each
// tensor's part of a task; parts start at multiples of `unit`.
template <class T, class F>
INLINE void each_piece(const T* tensors, i64 count, i64 unit, i64 bytes_each, int threads,
                       const F& body) {
  i64 total = 0;
  for (i64 i = 0; i < count; ++i) total += ceil_div(tensors[i].n, unit);
  if (total == 0) return;
  threads = useful_threads(total * unit * bytes_each, threads);
  // small sums are dealt out finely enough to be even, large ones in pieces
  const i64 share = most(1, least(kPiece / unit, ceil_div(total, 4 * i64(threads))));
  const i64 tasks = ceil_div(total, share);
  const Scratch scratch(4 * tasks);  // where each task starts: a tensor, and a unit of it
  i64* starts = reinterpret_cast<i64*>(scratch.data());
  i64 tensor = 0, at = 0;
  for (i64 task = 0; task < tasks; ++task, at += share) {
    for (i64 units; at >= (units = ceil_div(tensors[tensor].n, unit)); ++tensor) at -= units;
    starts[2 * task] = tensor;
    starts[2 * task + 1] = at;
  }
  parallel_for(tasks, threads, [&](i64 task) {
    i64 i = starts[2 * task], from = starts[2 * task + 1] * unit, left = share * unit;
    for (; i < count && left > 0; ++i, from = 0) {
      const i64 to = least(tensors[i].n, from + left);
      if (from >= to) continue;
      body(i, from, to);
      left -= ceil_div(to - from, unit) * unit;
    }
  });
}

void step(const Step& s) {
  each_piece(s.tensors, s.count, kRoom, 28, s.threads,
             [&](i64 i, i64 from, i64 to) { piece(s.kind, s.tensors[i], from, to); });
}

#include "cpu/kernels/optim_factored.inl"
#include "cpu/kernels/optim_gradients.inl"

constexpr Kernels table = {step, measure, scale, factor_squares, factor_direction};
