// Two of every four numbers back in their places, on any CPU: two of them make a vector.

INLINE Vec in_place(const float (&two)[4], unsigned bits) {
  float out[4];
  for (unsigned j = 0, rank = 0; j < 4; ++j) {
    out[j] = (bits >> j & 1) ? two[rank & 1] : 0.0f;
    rank += bits >> j & 1;
  }
  return load(out);
}
template <class T>
INLINE Vec expand(const T* p, unsigned bits) {
  float two[4];
  store(two, load(p, 2));
  return in_place(two, bits);
}
INLINE Vec expand(const int8_t* p, unsigned bits) {
  const float two[4] = {float(p[0]), float(p[1])};
  return in_place(two, bits);
}
