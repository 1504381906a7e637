// NEON with dot products: compiled for ARMv8.2, chosen where the CPU has them.
#define MPQ_NEON_DOT
#include "path_neon.inl"

namespace mpq {

const Path kNeonDot = {"neon", product_of<Isa, false>, quantize, dequantize, float_product, add, cell,
                       log_softmax};

}  // namespace mpq
