// The tiling that the vector paths share: UNITS x NB accumulators stay in registers over all columns.
//
// The includer defines struct Isa: Vec (kRows rows of 4 bytes), kRows, kMaxUnits(NB), load, broadcast,
// splat, zero-cost low / high nibbles, look_up, Tables, dot<WIDE>(acc, u, x), store.
#include <utility>

namespace {

using mpq::Matrix;

// Calls f(0), f(1), ... f(N - 1) with constants: arrays indexed by them stay in registers, which gcc
// does not do for arrays that any loop touches.
template <class F, int... I>
inline __attribute__((always_inline)) void each(const F& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}
#define MPQ_EACH(n, i, ...) \
    each([&](auto i) __attribute__((always_inline)) { __VA_ARGS__; }, std::make_integer_sequence<int, n>())

template <class Isa, int BITS, bool WIDE, int UNITS, int NB>
void tile(const Matrix& m, const uint8_t* first, const int8_t* x, const int32_t* sums, int batch,
          int32_t* y, int stride) {
    using Vec = typename Isa::Vec;
    constexpr int kPerBlock = mpq::kBlockRows / Isa::kRows, kGroups = 8 / BITS;
    const size_t block_n_bytes = size_t(m.n_packs) * 64;
    const typename Isa::Tables tables(m);
    Vec acc[UNITS][NB];
    MPQ_EACH(NB, b, const Vec start = Isa::splat(m.min_level * sums[b]);
             MPQ_EACH(UNITS, i, acc[i][b] = start));
    const uint8_t* w[UNITS];
    MPQ_EACH(UNITS, i, w[i] = first + (i / kPerBlock) * block_n_bytes + (i % kPerBlock) * Isa::kRows * 4);
    for (int p = 0; p < m.n_packs; ++p) {
        Vec codes[UNITS];
        MPQ_EACH(UNITS, i, codes[i] = Isa::load(w[i]); w[i] += 64);
        MPQ_EACH(kGroups, g, {
            Vec in[NB];
            MPQ_EACH(NB, b, in[b] = Isa::broadcast(x + 4 * b));
            x += 4 * batch;
            MPQ_EACH(UNITS, i, {
                const Vec u = Isa::template decode<BITS, g>(codes[i], tables);
                MPQ_EACH(NB, b, acc[i][b] = Isa::template dot<WIDE>(acc[i][b], u, in[b]));
            });
        });
    }
    MPQ_EACH(UNITS, i, MPQ_EACH(NB, b, Isa::store(y + b * stride + i * Isa::kRows, acc[i][b])));
}

// As many units a pass as the registers hold beside NB columns of the batch, then half, ...
template <class Isa, int BITS, bool WIDE, int UNITS, int NB>
void rows_of(const Matrix& m, int first, int n_units, const int8_t* x, const int32_t* sums, int batch,
             int32_t* y, int stride) {
    constexpr int kPerBlock = mpq::kBlockRows / Isa::kRows;
    for (; n_units >= UNITS; n_units -= UNITS, first += UNITS, y += UNITS * Isa::kRows) {
        const uint8_t* w = m.packs + size_t(first / kPerBlock) * m.n_packs * 64;
        tile<Isa, BITS, WIDE, UNITS, NB>(m, w, x, sums, batch, y, stride);
    }
    // A block has kPerBlock units, so an odd unit is never left over.
    if constexpr (UNITS > kPerBlock)
        rows_of<Isa, BITS, WIDE, UNITS / 2, NB>(m, first, n_units, x, sums, batch, y, stride);
}

template <class Isa, int BITS, bool WIDE, int NB>
void columns_of(int n, const Matrix& m, int first, int n_units, const int8_t* x, const int32_t* sums,
                int batch, int32_t* y, int stride) {
    if (n == NB)
        return rows_of<Isa, BITS, WIDE, Isa::max_units(NB), NB>(m, first, n_units, x, sums, batch, y,
                                                                stride);
    if constexpr (NB > 1)
        columns_of<Isa, BITS, WIDE, NB - 1>(n, m, first, n_units, x, sums, batch, y, stride);
}

template <class Isa, int BITS, bool WIDE>
void batch_of(const Matrix& m, const int8_t* x, const int32_t* sums, int batch, int first_block,
              int n_blocks, int32_t* y) {
    constexpr int kPerBlock = mpq::kBlockRows / Isa::kRows;
    const int stride = n_blocks * mpq::kBlockRows;
    // Tiles of nearly equal width: 20 is 10 + 10, not 12 + 8.
    int n_tiles = (batch + Isa::kMaxColumns - 1) / Isa::kMaxColumns;
    for (int b = 0; b < batch; --n_tiles) {
        const int n = (batch - b + n_tiles - 1) / n_tiles;
        columns_of<Isa, BITS, WIDE, Isa::kMaxColumns>(n, m, first_block * kPerBlock,
                                                      n_blocks * kPerBlock, x + 4 * b, sums + b, batch,
                                                      y + b * stride, stride);
        b += n;
    }
}

template <class Isa, bool WIDE>
void product_of(const Matrix& m, const int8_t* x, const int32_t* sums, int batch, int first_block,
                int n_blocks, int32_t* y) {
    switch (m.bits) {
        case 1: return batch_of<Isa, 1, WIDE>(m, x, sums, batch, first_block, n_blocks, y);
        case 2: return batch_of<Isa, 2, WIDE>(m, x, sums, batch, first_block, n_blocks, y);
        case 4: return batch_of<Isa, 4, WIDE>(m, x, sums, batch, first_block, n_blocks, y);
        default: return batch_of<Isa, 8, WIDE>(m, x, sums, batch, first_block, n_blocks, y);
    }
}

}  // namespace
