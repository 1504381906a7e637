// What the translation units of the kernel library share: matrices, the table of a path, sizes.
//
// Only plain data and declarations stand here: an inline function that is compiled for AVX-512 in one
// unit and merged by the linker into another would crash on older CPUs.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mpq {

constexpr int kBlockRows = 16;     // rows of a block: the int32 lanes of one 512-bit register
constexpr int kPadCols = 32;       // activations are padded to this: a pack of 1 bit, the widest
constexpr int kMaxCols = 65536;    // 128 * 128 * cols stays inside int32
constexpr int kMaxBatch = 120;     // larger batches are cut, so that scratch memory stays small
constexpr int kTablesPerByte = 8;  // 16 sums of 4 activations, 2 bytes each
constexpr int kChunkBlocks = 8;    // blocks of rows between two epilogues, of 8 rows of activations or more
constexpr int kMostChunkBlocks = 64;    // of one row

// Codes of a packed matrix, or of one group of its columns, in the kernels' layout. A block is 16
// rows. A group is 4 columns: 64 codes, row after row. A pack is one 64-byte vector that holds 8 / bits groups: group g of a pack has its codes at bits
// g * bits of every byte. Blocks follow each other, packs of a block too.
// The operand of the products is u = level - min_level, 0 .. 255.
struct Matrix {
    int64_t rows, cols;
    int bits;
    int n_blocks;        // ceil(rows / 16)
    int n_packs;         // per block
    int min_level;
    int max_u;
    int step;            // between two levels: u = step * code; 0 where it is not always the same
    uint8_t u_of_code[16];      // bits < 8; at 8 bits u is the code
    uint8_t tables[4][16];      // nibble -> u of its first, second, ... code
    uint8_t* packs;             // 64-byte aligned, n_blocks * n_packs * 64
    float* scales;              // n_blocks * 16, one per row
};

// A whole matrix: codes, one Matrix for each group of columns that has scales of its own, or floats.
struct Weights {
    int64_t rows, cols;
    int bits;              // 1, 2, 4, 8: codes; 16, 32: halves or floats
    int n_blocks;
    int64_t group_size;    // columns of a group; the last one may be shorter
    int n_groups;          // 0 for floats
    Matrix* groups;
    void* floats;          // [block][column][16 rows], 64-byte aligned
};

// One instruction set. Activations are int8 [padded_cols / 4][batch][4], sums int32 (batch,).
struct Path {
    const char* name;
    // y (batch, n_blocks * 16) int32 = levels of rows first_block * 16 ... times x
    void (*product)(const Matrix& m, const int8_t* x, const int32_t* sums, int batch, int first_block,
                    int n_blocks, int32_t* y);
    // q (cols,) int8 and the scale
    float (*quantize)(const float* x, int64_t cols, int8_t* q);
    // out = (sum + y * (x_scale * scales)) + bias; sum and bias may be null; sum may be out. All but out
    // are readable to the next multiple of 16.
    void (*dequantize)(const int32_t* y, float x_scale, const float* scales, const float* sum,
                       const float* bias, int n, float* out);
    // y (batch, n_blocks * 16) float = rows first_block * 16 ... times x (batch, cols), for floats
    void (*float_product)(const Weights& w, const float* x, int batch, int first_block, int n_blocks,
                          float* y);
    // out = (sum + y) + bias, as dequantize
    void (*add)(const float* y, const float* sum, const float* bias, int n, float* out);
    // LSTM cell of n units from the sums of gates i, f, g, o before their biases
    void (*cell)(const float* const* gates, const float* const* bias, int n, const float* c_in,
                 float* c_out, float* h_out);
    void (*log_softmax)(float* x, int64_t n);
    // Null, or products of 1-bit matrices from tables instead of x: kTablesPerByte bytes for each of x.
    void (*tabulate)(const int8_t* x, int n_packs, int batch, uint8_t* tables);
    void (*product_of_tables)(const Matrix& m, const uint8_t* tables, const int32_t* sums, int batch,
                              int first_block, int n_blocks, int32_t* y);
};

extern const Path kScalar;
#ifdef MPQ_X86
extern const Path kAvx2;
extern const Path kAvx512;
Path avx512_with_tables();
#endif
#ifdef MPQ_ARM64
extern const Path kNeon;
extern const Path kNeonDot;
#endif

// The path of a number (0 scalar, 1 avx2, 2 avx512, 3 avx512vbmi, 4 neon), null where this machine has
// not got it.
const Path* find_path(int path);

int padded_cols(int64_t cols);
// At most so many blocks between two epilogues: sums of about 8 KiB.
int most_blocks(int64_t batch);
// Blocks of rows of one part of the work: few enough that every thread has some.
int chunk_blocks(int n_blocks, int n_threads, int64_t batch);
void* aligned_new(size_t n_bytes);
void aligned_delete(void* p);
// 64-byte aligned memory for weights; pieces of a model lie in common huge pages, which the hardware reads
// ahead where it stops at the ends of small ones.
void* weights_new(size_t n_bytes);
void weights_delete(void* p, size_t n_bytes);

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
