// AVX2: 8-bit products are paired in 16 bits only where they cannot saturate.
#include <immintrin.h>

#include "kernels.h"

#define MPQ_LANES 8
#include "floats.inl"
#include "tiles.inl"

namespace {

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

void product(const ColumnGroup& group, const int8_t* x, const int32_t* sums, int batch, int first_block,
             int n_blocks, int32_t* y) {
    (group.max_u > 128 ? product_of<Isa, true> : product_of<Isa, false>)(group, x, sums, batch, first_block,
                                                                     n_blocks, y);
}

}  // namespace

namespace mpq {

const Path kAvx2 = {"avx2", product, quantize, dequantize, float_product, add, cell,
                    log_softmax, nullptr, nullptr};

}  // namespace mpq
