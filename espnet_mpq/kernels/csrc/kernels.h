// What the translation units of the kernel library share: matrices, the table of a path, sizes.
//
// Only plain data and declarations stand here: an inline function that is compiled for AVX-512 in one
// unit and merged by the linker into another would crash on older CPUs.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mpq {

constexpr int kBlockRows = 16;     // rows of a block: the int32 lanes of one 512-bit register
constexpr int kPadCols = 32;       // columns are padded to this: 4 columns x 8 codes a byte at 1 bit
constexpr int kMaxCols = 65536;    // 128 * 128 * cols stays inside int32
constexpr int kMaxBatch = 120;     // larger batches are cut, so that scratch memory stays small
constexpr int kChunkBlocks = 8;    // blocks of rows between two epilogues

// A packed matrix in the kernels' layout. A block is 16 rows. A group is 4 columns: 64 codes, row after
// row. A pack is one 64-byte vector that holds 8 / bits groups: group g of a pack has its codes at bits
// g * bits of every byte. Blocks follow each other, packs of a block too.
// The operand of the products is u = level - min_level, 0 .. 255.
struct Matrix {
    int64_t rows, cols;
    int bits;
    int n_blocks;        // ceil(rows / 16)
    int n_packs;         // per block
    int min_level;
    int max_u;
    uint8_t u_of_code[16];      // bits < 8; at 8 bits u is the code
    uint8_t tables[4][16];      // nibble -> u of its first, second, ... code
    uint8_t* packs;             // 64-byte aligned, n_blocks * n_packs * 64
    float* scales;              // n_blocks * 16, one per row
};

// One instruction set. Activations are int8 [padded_cols / 4][batch][4], sums int32 (batch,).
struct Path {
    const char* name;
    // y (batch, n_blocks * 16) int32 = levels of rows first_block * 16 ... times x
    void (*product)(const Matrix& m, const int8_t* x, const int32_t* sums, int batch, int first_block,
                    int n_blocks, int32_t* y);
    // q (cols,) int8 and the scale
    float (*quantize)(const float* x, int64_t cols, int8_t* q);
    // out = y * (x_scale * scales) + bias; bias may be null; y, scales and bias readable to 16 n
    void (*dequantize)(const int32_t* y, float x_scale, const float* scales, const float* bias, int n,
                       float* out);
    // LSTM cell of n units from the products y[0..3] (input) and y[4..7] (hidden) of gates i, f, g, o
    void (*cell)(const int32_t* const* y, float x_scale, float h_scale, const float* const* scales,
                 const float* const* bias, int n, const float* c_in, float* c_out, float* h_out);
    void (*log_softmax)(float* x, int64_t n);
};

extern const Path kScalar;
#ifdef MPQ_X86
extern const Path kAvx2;
extern const Path kAvx512;
#endif

// The path of a number (0 scalar, 1 avx2, 2 avx512), null where this machine has not got it.
const Path* find_path(int path);

int padded_cols(int64_t cols);
void* aligned_new(size_t n_bytes);
void aligned_delete(void* p);

// Memory of the calling thread, kept between calls; grows only. Null when there is no memory.
class Arena {
public:
    ~Arena();
    bool reserve(size_t n_bytes);
    void* take(size_t n_bytes);    // 64-byte aligned
    static size_t padded(size_t n_bytes) { return (n_bytes + 63) / 64 * 64; }

private:
    char* memory_ = nullptr;
    size_t size_ = 0, used_ = 0;
};
Arena& thread_arena();

// int8 (batch, cols) rows at `stride` -> [padded / 4][batch][4], zeros behind cols, and the sums.
void interleave(const int8_t* q, int64_t stride, int64_t cols, int batch, int8_t* x, int32_t* sums);

}  // namespace mpq
