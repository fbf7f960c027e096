// Columns with a large value. Magnitudes are compared as bits, which order them and put NaN on top.

constexpr i64 kLoudBand = 1024;  // columns that a task looks at: their tops stay in the L1 cache

// Writes the band's loud columns to places[1 + from...], and -1 after them where there is room.
template <class Bits>
void loud_band(const Loud& l, i64 from, i64 width) {
  constexpr Bits kMagnitude = Bits(~Bits(0)) >> 1;
  Bits tops[kLoudBand];
  Bits top = 0;
  for (i64 j = 0; j < width; j++) tops[j] = 0;
  for (i64 i = 0; i < l.m; i++) {
    const Bits* row = static_cast<const Bits*>(l.x) + i * l.x_row + from;
    for (i64 j = 0; j < width; j++) {
      const Bits v = row[j] & kMagnitude;
      tops[j] = v > tops[j] ? v : tops[j];
    }
  }
  for (i64 j = 0; j < width; j++) top = tops[j] > top ? tops[j] : top;
  i64 count = 0;
  if (top > Bits(l.limit))
    for (i64 j = 0; j < width; j++)
      if (tops[j] > Bits(l.limit)) l.places[1 + from + count++] = from + j;
  if (count < width) l.places[1 + from + count] = -1;
}

void loud(const Loud& l) {
  const int threads = useful_threads(l.m * l.k * l.size, l.threads);
  parallel_for(ceil_div(l.k, kLoudBand), threads, [&](i64 band) {
    const i64 from = band * kLoudBand, width = l.k - from < kLoudBand ? l.k - from : kLoudBand;
    if (l.size == 2)
      loud_band<uint16_t>(l, from, width);
    else
      loud_band<uint32_t>(l, from, width);
  });
  i64 count = 0;
  for (i64 from = 1; from <= l.k; from += kLoudBand)
    for (i64 j = from; j <= l.k && j < from + kLoudBand && l.places[j] >= 0; j++)
      l.places[1 + count++] = l.places[j];
  l.places[0] = count;
}
