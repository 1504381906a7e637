// NEON of any 64-bit ARM.
#include "path_neon.inl"

namespace mpq {

const Path kNeon = {"neon", product_of<Isa, false>, quantize, dequantize, float_product, add, cell,
                    log_softmax};

}  // namespace mpq
