// Integer words on any CPU: what products of codes need. A word is 32 bits.

typedef int32_t IntVec __attribute__((vector_size(4 * W)));

INLINE IntVec load_words(const void* p) {
  IntVec a;
  __builtin_memcpy(&a, p, sizeof a);
  return a;
}
INLINE void store_words(void* p, IntVec a) { __builtin_memcpy(p, &a, sizeof a); }
INLINE Vec to_float(IntVec a) { return {__builtin_convertvector(a, f32x4)}; }
INLINE IntVec nearest(Vec a) {
  IntVec out;
  for (int i = 0; i < W; ++i) out[i] = int32_t(__builtin_rintf(a.v[i]));
  return out;
}
INLINE IntVec bytes_as_words(const void* p) { return (IntVec)load_signed_bytes((const uint8_t*)p); }
INLINE IntVec lone_bytes(const void* p) { return (IntVec)load_bytes((const uint8_t*)p); }

// sum + a.low * b.low + a.high * b.high of the signed 16-bit halves of each word
INLINE IntVec dot_shorts(IntVec a, IntVec b, IntVec sum) {
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}
// 2 W signed bytes as 16-bit numbers.
INLINE IntVec bytes_as_shorts(const void* p) {
  const int8_t* s = (const int8_t*)p;
  IntVec out;
  for (int i = 0; i < W; ++i)
    out[i] = int32_t(uint32_t(uint16_t(s[2 * i])) | (uint32_t(uint16_t(s[2 * i + 1])) << 16));
  return out;
}
INLINE int32_t sum_words(IntVec a) { return (a[0] + a[1]) + (a[2] + a[3]); }

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
  return {f32x4{t.at[index[0] & 15], t.at[index[1] & 15], t.at[index[2] & 15],
                t.at[index[3] & 15]}};
}
