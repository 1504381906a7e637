// AVX2: 8-bit products are paired in 16 bits only where they cannot saturate.
#include <immintrin.h>

#include "kernels.h"

#define MPQ_LANES 8
#include "floats.inl"
#include "tiles.inl"

namespace {

using mpq::kBlockRows;

struct Isa : LookUpIsa<Isa> {
    using Vec = __m256i;
    static constexpr int kRows = 8;
    static constexpr int kAhead = 0;
    static constexpr int kMaxColumns = 4;

    static constexpr int max_units(int nb) { return nb <= 2 ? 4 : 2; }
    static constexpr int even_units(int, int) { return 0; }
    static Vec load(const uint8_t* p) {
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
    }
    static Vec splat(int32_t x) { return _mm256_set1_epi32(x); }
    static Vec broadcast(const int8_t* x) { return _mm256_set1_epi32(load_quad(x)); }
    static Vec low(Vec v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
    static Vec high(Vec v) { return low(_mm256_srli_epi16(v, 4)); }
    static Vec add(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
    // vpmaddubsw adds two products in int16 with saturation: exact for u <= 128, because
    // 2 * 128 * 127 and -2 * 128 * 128 fit. A wide u is split into its upper bit and the rest.
    template <bool WIDE>
    static Vec dot(Vec acc, Vec u, Vec x) {
        const Vec ones = _mm256_set1_epi16(1);
        if (!WIDE)
            return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), ones));
        const Vec top = _mm256_and_si256(u, _mm256_set1_epi8(-128));
        const Vec rest = _mm256_andnot_si256(_mm256_set1_epi8(-128), u);
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(top, x), ones));
        return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(rest, x), ones));
    }
    static void store(int32_t* p, Vec v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
    }

    struct Tables {
        Vec table[4];
        explicit Tables(const ColumnGroup& group) {
            for (int t = 0; t < 4; ++t)
                table[t] = _mm256_broadcastsi128_si256(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(group.tables[t])));
        }
        Vec look_up(Vec nibbles, int t) const { return _mm256_shuffle_epi8(table[t], nibbles); }
    };
};

// Equidistant levels of few bits: codes are so small that many products fit 16 bits, and the sums of kTerms
// quads are widened together. Of the three instructions of `dot` two are left, and codes need no table.
template <int BITS, int UNITS, int NB>
void narrow_tile(const ColumnGroup& group, const uint8_t* first, const int8_t* x, const int32_t* sums,
                 int batch, int32_t* y, int stride) {
    constexpr int kQuads = 8 / BITS, kTerms = 32767 / (2 * 128 * ((1 << BITS) - 1));
    constexpr int kPacks = kTerms / kQuads, kRows = Isa::kRows;
    static_assert(kPacks > 0);
    const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1), ones = _mm256_set1_epi16(1);
    const size_t block_n_bytes = size_t(group.n_packs) * kPackBytes;
    __m256i wide[UNITS][NB];
    MPQ_EACH(UNITS, i, MPQ_EACH(NB, b, wide[i][b] = _mm256_setzero_si256()));
    for (int p = 0; p < group.n_packs;) {
        __m256i acc[UNITS][NB];
        MPQ_EACH(UNITS, i, MPQ_EACH(NB, b, acc[i][b] = _mm256_setzero_si256()));
        const int last = p + kPacks < group.n_packs ? p + kPacks : group.n_packs;
        for (; p < last; ++p)
            MPQ_EACH(kQuads, quad, {
                __m256i u[UNITS];
                MPQ_EACH(UNITS, i, {
                    u[i] = Isa::load(first + (i / 2) * block_n_bytes + size_t(p) * kPackBytes +
                                     (i % 2) * kRows * kQuadCols);
                    u[i] = _mm256_and_si256(_mm256_srli_epi16(u[i], quad * BITS), mask);
                });
                MPQ_EACH(NB, b, {
                    const __m256i in = Isa::broadcast(x + kQuadCols * b);
                    MPQ_EACH(UNITS, i, {
                        acc[i][b] = _mm256_add_epi16(acc[i][b], _mm256_maddubs_epi16(u[i], in));
                    });
                });
                x += kQuadCols * batch;
            });
        MPQ_EACH(UNITS, i, MPQ_EACH(NB, b, {
            wide[i][b] = _mm256_add_epi32(wide[i][b], _mm256_madd_epi16(acc[i][b], ones));
        }));
    }
    const __m256i step = _mm256_set1_epi32(group.step);
    MPQ_EACH(NB, b, {
        const __m256i start = _mm256_set1_epi32(group.min_level * sums[b]);
        MPQ_EACH(UNITS, i, {
            const __m256i sum = _mm256_add_epi32(_mm256_mullo_epi32(wide[i][b], step), start);
            Isa::store(y + b * stride + i * kRows, sum);
        });
    });
}

template <int BITS, int NB>
void narrow_columns(int n, const ColumnGroup& group, int first_block, int n_blocks, const int8_t* x,
                    const int32_t* sums, int batch, int32_t* y, int stride) {
    constexpr int kUnits = NB <= 2 ? 4 : 2, kBlocks = kUnits / 2;
    if (n == NB) {
        const size_t block_n_bytes = size_t(group.n_packs) * kPackBytes;
        const uint8_t* w = group.packs + first_block * block_n_bytes;
        int block = 0;
        for (; block + kBlocks <= n_blocks; block += kBlocks)
            narrow_tile<BITS, kUnits, NB>(group, w + block * block_n_bytes, x, sums, batch,
                                          y + block * kBlockRows, stride);
        if (block < n_blocks)
            narrow_tile<BITS, 2, NB>(group, w + block * block_n_bytes, x, sums, batch,
                                     y + block * kBlockRows, stride);
        return;
    }
    if constexpr (NB > 1)
        narrow_columns<BITS, NB - 1>(n, group, first_block, n_blocks, x, sums, batch, y, stride);
}

template <int BITS>
void narrow_product(const ColumnGroup& group, const int8_t* x, const int32_t* sums, int batch,
                    int first_block, int n_blocks, int32_t* y) {
    constexpr int kMostColumns = 5;    // with 2 units 10 sums, of 16 registers; 4 are slower
    const int stride = n_blocks * kBlockRows;
    int n_tiles = (batch + kMostColumns - 1) / kMostColumns;
    for (int b = 0; b < batch; --n_tiles) {
        const int n = (batch - b + n_tiles - 1) / n_tiles;
        narrow_columns<BITS, kMostColumns>(n, group, first_block, n_blocks, x + kQuadCols * b, sums + b,
                                           batch, y + b * stride, stride);
        b += n;
    }
}

void product(const ColumnGroup& group, const int8_t* x, const int32_t* sums, int batch, int first_block,
             int n_blocks, int32_t* y) {
    if (group.step && group.bits < 8)
        return (group.bits == 1   ? narrow_product<1>
                : group.bits == 2 ? narrow_product<2>
                                  : narrow_product<4>)(group, x, sums, batch, first_block, n_blocks, y);
    (group.max_u > 128 ? product_of<Isa, true> : product_of<Isa, false>)(group, x, sums, batch, first_block,
                                                                     n_blocks, y);
}

}  // namespace

namespace mpq {

const Path kAvx2 = {"avx2", product, quantize, dequantize, float_product, add, cell,
                    log_softmax, nullptr, nullptr};

}  // namespace mpq
