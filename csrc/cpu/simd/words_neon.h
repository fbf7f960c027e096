// Integer words on NEON: what products of codes need. A word is 32 bits.

typedef int32_t IntVec __attribute__((vector_size(4 * W)));

INLINE IntVec load_words(const void* p) { return (IntVec)vld1q_s32((const int32_t*)p); }
INLINE void store_words(void* p, IntVec a) { vst1q_s32((int32_t*)p, (int32x4_t)a); }
INLINE Vec to_float(IntVec a) { return {vcvtq_f32_s32((int32x4_t)a)}; }
INLINE IntVec nearest(Vec a) { return (IntVec)vcvtnq_s32_f32(a.v); }
INLINE IntVec bytes_as_words(const void* p) { return (IntVec)load_signed_bytes((const uint8_t*)p); }
INLINE IntVec lone_bytes(const void* p) { return (IntVec)load_bytes((const uint8_t*)p); }

// sum + a.low * b.low + a.high * b.high of the signed 16-bit halves of each word
INLINE IntVec dot_shorts(IntVec a, IntVec b, IntVec sum) {
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
  return sum + (IntVec)vpaddq_s32(low, vmull_high_s16(x, y));
}
// 2 W signed bytes as 16-bit numbers.
INLINE IntVec bytes_as_shorts(const void* p) { return (IntVec)vmovl_s8(vld1_s8((const int8_t*)p)); }
INLINE int32_t sum_words(IntVec a) { return vaddvq_s32((int32x4_t)a); }

// Sixteen floats, picked by the low four bits of each word.
struct Table {
  float at[16];
};
INLINE Table load_table(const float* p) {
  Table t;
  __builtin_memcpy(t.at, p, sizeof t.at);
  return t;
}
INLINE Table scaled(Table t, float scale) {
  for (float& x : t.at) x *= scale;
  return t;
}
INLINE Table shifted(Table t, float by) {
  for (float& x : t.at) x -= by;
  return t;
}
INLINE Vec lookup(const Table& t, IntVec index) {
  const float out[4] = {t.at[index[0] & 15], t.at[index[1] & 15], t.at[index[2] & 15],
                        t.at[index[3] & 15]};
  return load(out);
}
