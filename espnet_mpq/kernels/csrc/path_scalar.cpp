// The portable path: plain C++ that any compiler and CPU can take; also the second opinion on the others.
#include "kernels.h"

#define MPQ_LANES 4
#include "floats.inl"

namespace mpq {

static void product(const ColumnGroup& group, const int8_t* x, const int32_t* sums, int batch,
                    int first_block, int n_blocks, int32_t* y) {
    const int per_pack = 8 / group.bits, mask = (1 << group.bits) - 1;
    const int stride = n_blocks * kBlockRows;
    for (int i = 0; i < n_blocks; ++i) {
        const uint8_t* pack = group.packs + size_t(first_block + i) * group.n_packs * kPackBytes;
        // Unsigned sums: partial sums may wrap, the last one fits.
        for (int b = 0; b < batch; ++b)
            for (int r = 0; r < kBlockRows; ++r)
                y[b * stride + i * kBlockRows + r] = group.min_level * sums[b];
        for (int p = 0; p < group.n_packs; ++p, pack += kPackBytes)
            for (int q = 0; q < per_pack; ++q) {
                int32_t u[kPackBytes];
                for (int j = 0; j < kPackBytes; ++j) {
                    const int code = (pack[j] >> (q * group.bits)) & mask;
                    u[j] = group.bits == 8 ? code : group.u_of_code[code];
                }
                const int8_t* quad = x + size_t(p * per_pack + q) * batch * kQuadCols;
                for (int b = 0; b < batch; ++b, quad += kQuadCols) {
                    int32_t* to = y + b * stride + i * kBlockRows;
                    for (int r = 0; r < kBlockRows; ++r) {
                        int32_t sum = 0;
                        for (int j = 0; j < kQuadCols; ++j) sum += u[kQuadCols * r + j] * quad[j];
                        to[r] = int32_t(uint32_t(to[r]) + uint32_t(sum));
                    }
                }
            }
    }
}

const Path kScalar = {"scalar", product, quantize, dequantize, float_product, add, cell, log_softmax};

}  // namespace mpq
