// AVX-512 with VBMI: products of 1-bit matrices by looking up sums of four activations.
//
// For every 4 columns there is a table of the 16 sums that 4 codes can choose; one instruction looks up
// 64 of them, in place of 4 that multiply. The other bit-widths go the way of path_avx512.cpp. The losing
// multiplications, for 1 bit, 2600 x 650, batch 10 / 20 / 60 on an AMD EPYC (Zen 4), microseconds with the
// making of the tables: multiplied 88 / 170 / 494, looked up 67 / 128 / 369. At 2 bits a table would cover
// two columns: 4 instructions for 128 products where VNNI needs 2 and a decoding that the batch shares.
#include <immintrin.h>

#include <cstring>

#include "each.inl"
#include "kernels.h"

namespace {

using mpq::ColumnGroup;
using mpq::kBlockRows;
using mpq::kNibbles;
using mpq::kPackBytes;
using mpq::kQuadCols;
using mpq::kTablesPerByte;

// A pack is one register, and a table of kNibbles bytes a quarter of one.
static_assert(mpq::kBlockRows == 16 && mpq::kQuadCols == 4);

inline __m512i dot(__m512i acc, __m512i u, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(x));
    return acc;
}

// A table has sum + kOffset, 0 .. 1020, as its lower 6 bits and the rest: two bytes, looked up apart. Not 7 bits:
// 64 is the largest power of two that fits the signed operand of the multiplication that joins them.
constexpr int kOffset = 512, kLowBits = 6;
constexpr int kQuadsOfPack = 8;    // of 1 bit
constexpr int kPackTableBytes = kQuadsOfPack * kQuadCols * kTablesPerByte;
constexpr int kAhead = 8192;    // bytes of codes to prefetch

// tables [batch][pack][lower and upper nibble][lower and upper bits][byte of the row][kNibbles]
void tabulate(const int8_t* x, int n_packs, int batch, uint8_t* tables) {
    alignas(64) uint8_t chosen[kPackBytes];    // byte k of row e: is bit k of e set
    for (int i = 0; i < kPackBytes; ++i) chosen[i] = (i / kQuadCols) >> (i % kQuadCols) & 1;
    const __m512i bits = _mm512_load_si512(chosen), offset = _mm512_set1_epi32(kOffset);
    const __m512i low = _mm512_set1_epi32((1 << kLowBits) - 1);
    const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int b = 0; b < batch; ++b)
        for (int p = 0; p < n_packs; ++p)
            for (int nibble = 0; nibble < 2; ++nibble, tables += kPackTableBytes / 2) {
                alignas(16) int32_t four[4];
                for (int q = 0; q < 4; ++q) {
                    const size_t quad = size_t(p) * kQuadsOfPack + nibble * 4 + q;
                    std::memcpy(four + q, x + (quad * batch + b) * kQuadCols, kQuadCols);
                }
                const __m128i columns = _mm_shuffle_epi8(
                    _mm_load_si128(reinterpret_cast<const __m128i*>(four)), transpose);
                const __m512i all = _mm512_broadcast_i32x4(columns);
                MPQ_EACH(kQuadCols, j, {
                    const __m512i of_byte = _mm512_shuffle_epi32(all, _MM_PERM_ENUM(j * 0x55));
                    const __m512i sums = dot(offset, bits, of_byte);
                    const __m128i lower = _mm512_cvtepi32_epi8(_mm512_and_si512(sums, low));
                    const __m128i upper = _mm512_cvtepi32_epi8(_mm512_srli_epi32(sums, kLowBits));
                    _mm_store_si128(reinterpret_cast<__m128i*>(tables + j * kNibbles), lower);
                    _mm_store_si128(reinterpret_cast<__m128i*>(tables + kPackBytes + j * kNibbles), upper);
                });
            }
}

template <int BLOCKS, int NB>
void tile(const ColumnGroup& group, const uint8_t* first, const uint8_t* tables, const int32_t* sums,
          int32_t* y, int stride) {
    const size_t block_n_bytes = size_t(group.n_packs) * kPackBytes;
    const size_t batch_n_bytes = size_t(group.n_packs) * kPackTableBytes;
    // The 4 tables of a nibble lie in one register: bits 4 and 5 of the index are the byte's place.
    const __m512i place = _mm512_set1_epi32(0x30201000), nibble = _mm512_set1_epi8(15);
    const __m512i one = _mm512_set1_epi8(1), of_upper = _mm512_set1_epi8(1 << kLowBits);
    __m512i acc[BLOCKS][NB];
    MPQ_EACH(BLOCKS, i, MPQ_EACH(NB, b, acc[i][b] = _mm512_setzero_si512()));
    for (int p = 0; p < group.n_packs; ++p, tables += kPackTableBytes) {
        __m512i table[NB][4];
        MPQ_EACH(NB, b, MPQ_EACH(4, t, {
            table[b][t] = _mm512_load_si512(tables + b * batch_n_bytes + t * kPackBytes);
        }));
        MPQ_EACH(BLOCKS, i, {
            const uint8_t* w = first + i * block_n_bytes + size_t(p) * kPackBytes;
            const __m512i codes = _mm512_load_si512(w);
            __builtin_prefetch(w + (kAhead / (BLOCKS * block_n_bytes) + 1) * BLOCKS * block_n_bytes, 0, 2);
            // (codes & nibble) | place
            const __m512i low = _mm512_ternarylogic_epi32(codes, nibble, place, 0xEA);
            const __m512i high =
                _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 4), nibble, place, 0xEA);
            MPQ_EACH(NB, b, {
                const __m512i lower = _mm512_add_epi8(_mm512_permutexvar_epi8(low, table[b][0]),
                                                      _mm512_permutexvar_epi8(high, table[b][2]));
                const __m512i upper = _mm512_add_epi8(_mm512_permutexvar_epi8(low, table[b][1]),
                                                      _mm512_permutexvar_epi8(high, table[b][3]));
                acc[i][b] = dot(dot(acc[i][b], lower, one), upper, of_upper);
            });
        });
    }
    const __m512i step = _mm512_set1_epi32(group.step);
    MPQ_EACH(NB, b, {
        // Unsigned: partial sums may wrap, the last one fits.
        const uint32_t offset = uint32_t(group.step) * kQuadsOfPack * kOffset * uint32_t(group.n_packs);
        const __m512i start = _mm512_set1_epi32(int32_t(uint32_t(group.min_level * sums[b]) - offset));
        MPQ_EACH(BLOCKS, i, {
            const __m512i scaled = _mm512_mullo_epi32(acc[i][b], step);
            _mm512_storeu_si512(y + b * stride + i * kBlockRows, _mm512_add_epi32(scaled, start));
        });
    });
}

template <int BLOCKS, int NB>
void rows_of(const ColumnGroup& group, int first, int n_blocks, const uint8_t* tables, const int32_t* sums,
             int32_t* y, int stride) {
    for (; n_blocks >= BLOCKS; n_blocks -= BLOCKS, first += BLOCKS, y += BLOCKS * kBlockRows)
        tile<BLOCKS, NB>(group, group.packs + size_t(first) * group.n_packs * kPackBytes, tables, sums, y,
                         stride);
    if constexpr (BLOCKS > 1) rows_of<BLOCKS / 2, NB>(group, first, n_blocks, tables, sums, y, stride);
}

void product(const ColumnGroup& group, const uint8_t* tables, const int32_t* sums, int batch,
             int first_block, int n_blocks, int32_t* y) {
    const int stride = n_blocks * kBlockRows;
    const size_t batch_n_bytes = size_t(group.n_packs) * kPackTableBytes;
    for (int b = 0; b < batch;) {
        const int left = batch - b, n = left >= 4 ? 4 : left;
        (n == 4   ? rows_of<4, 4>
         : n == 3 ? rows_of<4, 3>
         : n == 2 ? rows_of<4, 2>
                  : rows_of<8, 1>)(group, first_block, n_blocks, tables + b * batch_n_bytes, sums + b,
                                   y + b * stride, stride);
        b += n;
    }
}

}  // namespace

namespace mpq {

Path avx512_with_tables() {
    Path path = kAvx512;
    path.name = "avx512vbmi";
    path.tabulate = tabulate;
    path.product_of_tables = product;
    return path;
}

}  // namespace mpq
