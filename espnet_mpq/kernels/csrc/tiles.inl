// The tiling that the vector paths share: UNITS x NB accumulators stay in registers over all columns.
//
// The includer defines struct Isa: Vec (kRows rows of a quad), kRows, max_units(nb), kMaxColumns (of NB), load,
// broadcast, splat, add, Tables, decode<BITS, QUAD>(codes, tables) -> operands of a quad of a pack (levels if
// kIsSigned, else u), dot<WIDE>(acc, operands, x), store, and how far to prefetch, kAhead bytes.
// even_units(bits, nb): units of the tiles that need no tables, 0 for none; they use masked, shifted<BITS>(v),
// times.
#include <cstring>

#include "each.inl"

namespace {

using mpq::ColumnGroup;
using mpq::kPackBytes;
using mpq::kQuadCols;

// What the Isas of x86 share: operands are u, and codes of less than 8 bits are looked up by nibbles.
template <class Self>
struct LookUpIsa {
    static constexpr bool kIsSigned = false;

    template <int BITS, int QUAD, class Vec, class Tables>
    static Vec decode(Vec codes, const Tables& tables) {
        if constexpr (BITS == 8) return codes;
        constexpr int kHalf = 4 / BITS;    // quads of a nibble
        const Vec nibbles = QUAD < kHalf ? Self::low(codes) : Self::high(codes);
        return tables.look_up(nibbles, QUAD % (kHalf ? kHalf : 1));
    }
};

// The activations of one quad, to be broadcast.
inline int32_t load_quad(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, kQuadCols);
    return quad;
}

// Codes are looked up, or, where levels are equidistant and registers are many (EVEN), masked where they
// stand: each quad of a pack then has sums of its own, of code << (quad * BITS), and no shift, no table.
template <class Isa, int BITS, bool WIDE, bool EVEN, int UNITS, int NB>
void tile(const ColumnGroup& group, const uint8_t* first, const int8_t* x, const int32_t* sums, int batch,
          int32_t* y, int stride) {
    using Vec = typename Isa::Vec;
    constexpr int kPerBlock = kBlockRows / Isa::kRows, kQuads = 8 / BITS;
    constexpr int kSums = EVEN ? kQuads : 1;
    const size_t block_n_bytes = size_t(group.n_packs) * kPackBytes;
    const typename Isa::Tables tables(group);
    // A later tile's codes go into the second-level cache, unless loading is all there is to do.
    constexpr bool kPrefetches = Isa::kAhead && (BITS < 8 || NB > 3);
    const size_t tile_n_bytes = (UNITS + kPerBlock - 1) / kPerBlock * block_n_bytes;
    const size_t ahead = (Isa::kAhead / tile_n_bytes + 1) * tile_n_bytes;
    Vec acc[UNITS][NB][kSums];
    const uint8_t* w[UNITS];
    MPQ_EACH(UNITS, i, {
        MPQ_EACH(NB, b, MPQ_EACH(kSums, s, acc[i][b][s] = Isa::splat(0)));
        w[i] = first + (i / kPerBlock) * block_n_bytes + (i % kPerBlock) * Isa::kRows * kQuadCols;
    });
    for (int p = 0; p < group.n_packs; ++p) {
        Vec codes[UNITS];
        MPQ_EACH(UNITS, i, {
            codes[i] = Isa::load(w[i]);
            if (kPrefetches) __builtin_prefetch(w[i] + ahead, 0, 2);
            w[i] += kPackBytes;
        });
        MPQ_EACH(kQuads, quad, {
            Vec in[NB];
            MPQ_EACH(NB, b, in[b] = Isa::broadcast(x + kQuadCols * b));
            x += kQuadCols * batch;
            MPQ_EACH(UNITS, i, {
                Vec u;
                if constexpr (EVEN)
                    u = Isa::masked(codes[i], ((1 << BITS) - 1) << (quad * BITS));
                else
                    u = Isa::template decode<BITS, quad>(codes[i], tables);
                MPQ_EACH(NB, b, {
                    Vec& sum = acc[i][b][EVEN ? quad : 0];
                    sum = Isa::template dot<WIDE>(sum, u, in[b]);
                });
            });
        });
    }
    MPQ_EACH(NB, b, {
        const Vec start = Isa::splat(Isa::kIsSigned ? 0 : group.min_level * sums[b]);
        MPQ_EACH(UNITS, i, {
            Vec sum = acc[i][b][0];
            if constexpr (EVEN) {
                MPQ_EACH(kQuads - 1, quad, {
                    sum = Isa::add(sum, Isa::template shifted<(quad + 1) * BITS>(acc[i][b][quad + 1]));
                });
                sum = Isa::times(sum, group.step);
            }
            Isa::store(y + b * stride + i * Isa::kRows, Isa::add(sum, start));
        });
    });
}

// As many units a pass as the registers hold beside NB columns of the batch, then half, ...
template <class Isa, int BITS, bool WIDE, bool EVEN, int UNITS, int NB>
void rows_of(const ColumnGroup& group, int first, int n_units, const int8_t* x, const int32_t* sums,
             int batch, int32_t* y, int stride) {
    constexpr int kPerBlock = kBlockRows / Isa::kRows;
    for (; n_units >= UNITS; n_units -= UNITS, first += UNITS, y += UNITS * Isa::kRows) {
        const uint8_t* w = group.packs + size_t(first / kPerBlock) * group.n_packs * kPackBytes;
        if constexpr (UNITS % kPerBlock) w += first % kPerBlock * Isa::kRows * kQuadCols;
        tile<Isa, BITS, WIDE, EVEN, UNITS, NB>(group, w, x, sums, batch, y, stride);
    }
    // A block has kPerBlock units, so an odd unit is never left over.
    if constexpr (UNITS > kPerBlock)
        rows_of<Isa, BITS, WIDE, EVEN, UNITS / 2, NB>(group, first, n_units, x, sums, batch, y, stride);
}

template <class Isa, int BITS, bool WIDE, int NB>
void columns_of(int n, const ColumnGroup& group, int first, int n_units, const int8_t* x,
                const int32_t* sums, int batch, int32_t* y, int stride) {
    if (n == NB) {
        constexpr int kEvenUnits = Isa::even_units(BITS, NB);
        if constexpr (kEvenUnits > 0)
            if (group.step)
                return rows_of<Isa, BITS, WIDE, true, kEvenUnits, NB>(group, first, n_units, x, sums, batch,
                                                                      y, stride);
        return rows_of<Isa, BITS, WIDE, false, Isa::max_units(NB), NB>(group, first, n_units, x, sums,
                                                                       batch, y, stride);
    }
    if constexpr (NB > 1)
        columns_of<Isa, BITS, WIDE, NB - 1>(n, group, first, n_units, x, sums, batch, y, stride);
}

template <class Isa, int BITS, bool WIDE>
void batch_of(const ColumnGroup& group, const int8_t* x, const int32_t* sums, int batch, int first_block,
              int n_blocks, int32_t* y) {
    constexpr int kPerBlock = kBlockRows / Isa::kRows;
    const int stride = n_blocks * kBlockRows;
    // Tiles of nearly equal width: 20 is 10 + 10, not 12 + 8.
    int n_tiles = (batch + Isa::kMaxColumns - 1) / Isa::kMaxColumns;
    for (int b = 0; b < batch; --n_tiles) {
        const int n = (batch - b + n_tiles - 1) / n_tiles;
        columns_of<Isa, BITS, WIDE, Isa::kMaxColumns>(n, group, first_block * kPerBlock,
                                                      n_blocks * kPerBlock, x + kQuadCols * b, sums + b, batch,
                                                      y + b * stride, stride);
        b += n;
    }
}

template <class Isa, bool WIDE>
void product_of(const ColumnGroup& group, const int8_t* x, const int32_t* sums, int batch, int first_block,
                int n_blocks, int32_t* y) {
    switch (group.bits) {
        case 1: return batch_of<Isa, 1, WIDE>(group, x, sums, batch, first_block, n_blocks, y);
        case 2: return batch_of<Isa, 2, WIDE>(group, x, sums, batch, first_block, n_blocks, y);
        case 4: return batch_of<Isa, 4, WIDE>(group, x, sums, batch, first_block, n_blocks, y);
        default: return batch_of<Isa, 8, WIDE>(group, x, sums, batch, first_block, n_blocks, y);
    }
}

}  // namespace
