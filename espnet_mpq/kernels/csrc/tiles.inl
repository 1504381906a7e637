// The tiling that the vector paths share: UNITS x NB accumulators stay in registers over all columns.
//
// The includer defines struct Isa: Vec (kRows rows of 4 bytes), kRows, kMaxUnits(NB), load, broadcast,
// splat, add, Tables, decode<BITS, G>(codes, tables) -> operands of group G of a pack (levels if
// kIsSigned, else u), dot<WIDE>(acc, operands, x), store, and how far to prefetch. even_units(bits, nb):
// units of the tiles that need no tables, 0 for none; they use masked, shifted<BITS>(v), times.
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

// Codes are looked up, or, where levels are equidistant and registers are many (EVEN), masked where they
// stand: each group then has sums of its own, of code << (group * BITS), and no shift, no table.
template <class Isa, int BITS, bool WIDE, bool EVEN, int UNITS, int NB>
void tile(const Matrix& m, const uint8_t* first, const int8_t* x, const int32_t* sums, int batch,
          int32_t* y, int stride) {
    using Vec = typename Isa::Vec;
    constexpr int kPerBlock = mpq::kBlockRows / Isa::kRows, kGroups = 8 / BITS;
    constexpr int kSums = EVEN ? kGroups : 1;
    const size_t block_n_bytes = size_t(m.n_packs) * 64;
    const typename Isa::Tables tables(m);
    // A later tile's codes go into the second-level cache, unless loading is all there is to do.
    constexpr bool kPrefetches = Isa::kAhead && (BITS < 8 || NB > 3);
    const size_t tile_n_bytes = (UNITS + kPerBlock - 1) / kPerBlock * block_n_bytes;
    const size_t ahead = (Isa::kAhead / tile_n_bytes + 1) * tile_n_bytes;
    Vec acc[UNITS][NB][kSums];
    const uint8_t* w[UNITS];
    MPQ_EACH(UNITS, i, {
        MPQ_EACH(NB, b, MPQ_EACH(kSums, s, acc[i][b][s] = Isa::splat(0)));
        w[i] = first + (i / kPerBlock) * block_n_bytes + (i % kPerBlock) * Isa::kRows * 4;
    });
    for (int p = 0; p < m.n_packs; ++p) {
        Vec codes[UNITS];
        MPQ_EACH(UNITS, i, {
            codes[i] = Isa::load(w[i]);
            if (kPrefetches) __builtin_prefetch(w[i] + ahead, 0, 2);
            w[i] += 64;
        });
        MPQ_EACH(kGroups, g, {
            Vec in[NB];
            MPQ_EACH(NB, b, in[b] = Isa::broadcast(x + 4 * b));
            x += 4 * batch;
            MPQ_EACH(UNITS, i, {
                Vec u;
                if constexpr (EVEN)
                    u = Isa::masked(codes[i], ((1 << BITS) - 1) << (g * BITS));
                else
                    u = Isa::template decode<BITS, g>(codes[i], tables);
                MPQ_EACH(NB, b, {
                    Vec& sum = acc[i][b][EVEN ? g : 0];
                    sum = Isa::template dot<WIDE>(sum, u, in[b]);
                });
            });
        });
    }
    MPQ_EACH(NB, b, {
        const Vec start = Isa::splat(Isa::kIsSigned ? 0 : m.min_level * sums[b]);
        MPQ_EACH(UNITS, i, {
            Vec sum = acc[i][b][0];
            if constexpr (EVEN) {
                MPQ_EACH(kGroups - 1, g, {
                    sum = Isa::add(sum, Isa::template shifted<(g + 1) * BITS>(acc[i][b][g + 1]));
                });
                sum = Isa::times(sum, m.step);
            }
            Isa::store(y + b * stride + i * Isa::kRows, Isa::add(sum, start));
        });
    });
}

// As many units a pass as the registers hold beside NB columns of the batch, then half, ...
template <class Isa, int BITS, bool WIDE, bool EVEN, int UNITS, int NB>
void rows_of(const Matrix& m, int first, int n_units, const int8_t* x, const int32_t* sums, int batch,
             int32_t* y, int stride) {
    constexpr int kPerBlock = mpq::kBlockRows / Isa::kRows;
    for (; n_units >= UNITS; n_units -= UNITS, first += UNITS, y += UNITS * Isa::kRows) {
        const uint8_t* w = m.packs + size_t(first / kPerBlock) * m.n_packs * 64;
        tile<Isa, BITS, WIDE, EVEN, UNITS, NB>(m, w, x, sums, batch, y, stride);
    }
    // A block has kPerBlock units, so an odd unit is never left over.
    if constexpr (UNITS > kPerBlock)
        rows_of<Isa, BITS, WIDE, EVEN, UNITS / 2, NB>(m, first, n_units, x, sums, batch, y, stride);
}

template <class Isa, int BITS, bool WIDE, int NB>
void columns_of(int n, const Matrix& m, int first, int n_units, const int8_t* x, const int32_t* sums,
                int batch, int32_t* y, int stride) {
    if (n == NB) {
        constexpr int kEvenUnits = Isa::even_units(BITS, NB);
        if constexpr (kEvenUnits > 0)
            if (m.step)
                return rows_of<Isa, BITS, WIDE, true, kEvenUnits, NB>(m, first, n_units, x, sums, batch,
                                                                      y, stride);
        return rows_of<Isa, BITS, WIDE, false, Isa::max_units(NB), NB>(m, first, n_units, x, sums,
                                                                       batch, y, stride);
    }
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
