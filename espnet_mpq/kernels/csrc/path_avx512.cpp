// AVX-512 VNNI: 64 multiply-adds an instruction, weights unsigned, activations signed and broadcast.
#include <immintrin.h>

#include "kernels.h"

#define MPQ_LANES 16
#include "floats.inl"
#include "tiles.inl"

namespace {

struct Isa : LookUpIsa<Isa> {
    using Vec = __m512i;
    static constexpr int kRows = 16;
    static constexpr int kAhead = 8192;    // bytes
    static constexpr int kMaxColumns = 8;

    // 8 to 24 accumulators of 32 registers; many rows at small batch, for one is latency-bound.
    static constexpr int max_units(int nb) { return nb <= 2 ? 8 : nb <= 5 ? 4 : 2; }
    // Units of the tiles with sums of each quad: 8 accumulators a column; more streams of codes are slower.
    static constexpr int even_units(int bits, int nb) { return bits == 8 || nb > 2 ? 0 : bits; }
    static Vec load(const uint8_t* p) { return _mm512_load_si512(p); }
    static Vec splat(int32_t x) { return _mm512_set1_epi32(x); }
    static Vec broadcast(const int8_t* x) { return _mm512_set1_epi32(load_quad(x)); }
    static Vec low(Vec v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
    static Vec high(Vec v) { return low(_mm512_srli_epi16(v, 4)); }
    static Vec masked(Vec v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8(char(mask))); }
    static Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
    static Vec times(Vec v, int by) { return _mm512_mullo_epi32(v, _mm512_set1_epi32(by)); }
    template <int BY>
    static Vec shifted(Vec v) {
        return _mm512_srai_epi32(v, BY);
    }
    // The non-saturating form: four products are added to an int32.
    template <bool WIDE>
    static Vec dot(Vec acc, Vec u, Vec x) {
        // Not the intrinsic: for it gcc 12 keeps two copies of every accumulator, half of them in memory.
        asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(x));
        return acc;
    }
    static void store(int32_t* p, Vec v) { _mm512_storeu_si512(p, v); }

    struct Tables {
        Vec table[4];
        explicit Tables(const ColumnGroup& group) {
            for (int t = 0; t < 4; ++t)
                table[t] = _mm512_broadcast_i32x4(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(group.tables[t])));
        }
        Vec look_up(Vec nibbles, int t) const { return _mm512_shuffle_epi8(table[t], nibbles); }
    };
};

}  // namespace

namespace mpq {

const Path kAvx512 = {"avx512", product_of<Isa, false>, quantize, dequantize, float_product, add, cell,
                      log_softmax, nullptr, nullptr};

}  // namespace mpq
