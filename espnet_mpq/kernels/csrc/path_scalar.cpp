// The portable path: plain C++ that any compiler and CPU can take; also the second opinion on the others.
#include "kernels.h"

#define MPQ_LANES 4
#include "floats.inl"

namespace mpq {

static void product(const Matrix& m, const int8_t* x, const int32_t* sums, int batch, int first_block,
                    int n_blocks, int32_t* y) {
    const int per_pack = 8 / m.bits, mask = (1 << m.bits) - 1;
    const int stride = n_blocks * kBlockRows;
    for (int i = 0; i < n_blocks; ++i) {
        const uint8_t* pack = m.packs + size_t(first_block + i) * m.n_packs * 64;
        // Unsigned sums: partial sums may wrap, the last one fits.
        for (int b = 0; b < batch; ++b)
            for (int r = 0; r < kBlockRows; ++r)
                y[b * stride + i * kBlockRows + r] = m.min_level * sums[b];
        for (int p = 0; p < m.n_packs; ++p, pack += 64)
            for (int g = 0; g < per_pack; ++g) {
                int32_t u[64];
                for (int j = 0; j < 64; ++j) {
                    const int code = (pack[j] >> (g * m.bits)) & mask;
                    u[j] = m.bits == 8 ? code : m.u_of_code[code];
                }
                const int8_t* group = x + size_t(p * per_pack + g) * batch * 4;
                for (int b = 0; b < batch; ++b, group += 4) {
                    int32_t* to = y + b * stride + i * kBlockRows;
                    for (int r = 0; r < kBlockRows; ++r) {
                        int32_t sum = 0;
                        for (int j = 0; j < 4; ++j) sum += u[4 * r + j] * group[j];
                        to[r] = int32_t(uint32_t(to[r]) + uint32_t(sum));
                    }
                }
            }
    }
}

const Path kScalar = {"scalar", product, quantize, dequantize, float_product, add, cell, log_softmax};

}  // namespace mpq
