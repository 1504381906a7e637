// NEON, compiled twice: with the dot product instructions of ARMv8.2 (MPQ_NEON_DOT) and without.
#include <arm_neon.h>

#include "kernels.h"

#define MPQ_LANES 4
#include "floats.inl"
#include "tiles.inl"

namespace {

// Matrix are signed here, levels themselves: least is added to the tables, or to codes of 8 bits.
struct Isa {
    using Vec = int32x4_t;
    static constexpr int kRows = 4;
    static constexpr int kMaxColumns = 4;
    static constexpr int kAhead = 0;
    static constexpr bool kIsSigned = true;

    static constexpr int max_units(int nb) { return nb <= 2 ? 8 : 4; }
    static constexpr int even_units(int, int) { return 0; }
    static Vec load(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
    static Vec splat(int32_t x) { return vdupq_n_s32(x); }
    static Vec broadcast(const int8_t* x) { return vdupq_n_s32(load_quad(x)); }
    static Vec add(Vec a, Vec b) { return vaddq_s32(a, b); }
    static void store(int32_t* p, Vec v) { vst1q_s32(p, v); }

    struct Tables {
        int8x16_t least, table[4];
        explicit Tables(const ColumnGroup& group) : least(vdupq_n_s8(int8_t(group.min_level))) {
            for (int t = 0; t < 4; ++t)
                table[t] = vaddq_s8(vreinterpretq_s8_u8(vld1q_u8(group.tables[t])), least);
        }
    };
    template <int BITS, int QUAD>
    static Vec decode(Vec v, const Tables& tables) {
        const uint8x16_t codes = vreinterpretq_u8_s32(v);
        if constexpr (BITS == 8) {
            return vreinterpretq_s32_s8(vaddq_s8(vreinterpretq_s8_u8(codes), tables.least));
        } else {
            constexpr int kHalf = 4 / BITS;
            const uint8x16_t nibbles =
                QUAD < kHalf ? vandq_u8(codes, vdupq_n_u8(15)) : vshrq_n_u8(codes, 4);
            return vreinterpretq_s32_s8(vqtbl1q_s8(tables.table[QUAD % kHalf], nibbles));
        }
    }
    template <bool WIDE>
    static Vec dot(Vec acc, Vec w, Vec x) {
        const int8x16_t a = vreinterpretq_s8_s32(w), b = vreinterpretq_s8_s32(x);
#ifdef MPQ_NEON_DOT
        return vdotq_s32(acc, a, b);
#else
        // Two products of -128 by -128 leave int16, so they are paired in 32 bits.
        const int32x4_t first = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
        const int32x4_t second = vpaddlq_s16(vmull_s8(vget_high_s8(a), vget_high_s8(b)));
        return vaddq_s32(acc, vpaddq_s32(first, second));
#endif
    }
};

}  // namespace
