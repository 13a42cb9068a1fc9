#include "matrix_instructions.h"

#include "elements.h"

namespace linearard::emulation {
namespace {

struct MultiplyAdd {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
void perform(MultiplyAdd* const* lanes) {
  float a[16][16];
  float b[8][16];  // by column
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* const to = &a[group + i % 2 * 8][pair + i / 2 * 8];
      to[0] = to_float<T>(static_cast<uint16_t>(lanes[lane]->a[i]));
      to[1] = to_float<T>(static_cast<uint16_t>(lanes[lane]->a[i] >> 16));
    }
    for (int i = 0; i < 2; ++i) {
      float* const to = &b[group][pair + i * 8];
      to[0] = to_float<T>(static_cast<uint16_t>(lanes[lane]->b[i]));
      to[1] = to_float<T>(static_cast<uint16_t>(lanes[lane]->b[i] >> 16));
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int c = 0; c < 4; ++c) {
      const int row = lane / 4 + c / 2 * 8;
      const int column = lane % 4 * 2 + c % 2;
      double sum = lanes[lane]->d[c];
      for (int k = 0; k < 16; ++k)
        sum += static_cast<double>(a[row][k]) * b[column][k];
      lanes[lane]->d[c] = static_cast<float>(sum);
    }
  }
}

}  // namespace

template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Location& at) {
  MultiplyAdd mine{d, a, {b0, b1}};
  warp_collective("mma", ~0u, true, mine, at, perform<T>);
}

template void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Location& at);
template void multiply_add<__nv_bfloat16>(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Location& at);

}  // namespace linearard::emulation
