#include "warp.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

struct Fragments {
  const uint32_t *a, *b;
  const float* c;
};

// The unit ignores the low 13 bits of a tf32 factor.
float tf32(uint32_t bits) {
  bits &= ~0x1fffu;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Number `half` of the two 16-bit factors in a register.
template <class T>
float half_of(uint32_t bits, int half) {
  const uint16_t one = uint16_t(half == 0 ? bits : bits >> 16);
  T value;
  std::memcpy(&value, &one, sizeof value);
  return float(value);
}

// A: 16 x 8, B: 8 x 8. Lane l holds rows l / 4 (+ 8) of A and columns l % 4 (+ 4); B's columns l / 4 and rows l % 4 (+ 4).
void factors_of(const Fragments& in, int lane, float (&a)[16][8], float (&b)[8][8]) {
  const int group = lane / 4, rest = lane % 4;
  for (int i = 0; i < 4; ++i) a[group + 8 * (i % 2)][rest + 4 * (i / 2)] = tf32(in.a[i]);
  for (int i = 0; i < 2; ++i) b[rest + 4 * i][group] = tf32(in.b[i]);
}

// A: 16 x 16, B: 16 x 8, two neighbours of a row of A (a column of B) in each register.
template <class T>
void factors_of(const Fragments& in, int lane, float (&a)[16][16], float (&b)[16][8]) {
  const int group = lane / 4, rest = lane % 4;
  for (int i = 0; i < 8; ++i) a[group + 8 * (i / 2 % 2)][2 * rest + i % 2 + 8 * (i / 4)] = half_of<T>(in.a[i / 2], i % 2);
  for (int i = 0; i < 4; ++i) b[2 * rest + i % 2 + 8 * (i / 2)][group] = half_of<T>(in.b[i / 2], i % 2);
}

template <int K, class Read>
void multiply_warp(Lane (&lanes)[32], Read read) {
  float a[16][K], b[K][8];
  for (int lane = 0; lane < 32; ++lane) read(*static_cast<const Fragments*>(lanes[lane].in), lane, a, b);
  for (int lane = 0; lane < 32; ++lane) {
    const float* c = static_cast<const Fragments*>(lanes[lane].in)->c;
    float result[4];
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      result[i] = c[i];
      for (int k = 0; k < K; ++k) result[i] += a[row][k] * b[k][column];
    }
    std::memcpy(lanes[lane].out, result, sizeof result);
  }
}

using Compute = void (*)(unsigned, Lane (&)[32]);

void multiply_tf32(unsigned, Lane (&lanes)[32]) {
  multiply_warp<8>(lanes, [](const Fragments& in, int lane, float(&a)[16][8], float(&b)[8][8]) { factors_of(in, lane, a, b); });
}

template <class T>
void multiply_16_bit(unsigned, Lane (&lanes)[32]) {
  multiply_warp<16>(lanes,
                    [](const Fragments& in, int lane, float(&a)[16][16], float(&b)[16][8]) { factors_of<T>(in, lane, a, b); });
}

}  // namespace

bool same_place(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

void together(unsigned mask, const char* operation, const Location& where, const void* in, void* out, Compute compute) {
  Thread& self = *running();
  Warp& warp = warp_of(self);
  const int lane = self.lane();
  const auto place = [&] { return std::string(operation) + " at " + to_string(where); };
  if (!(mask >> lane & 1)) fail("lane " + std::to_string(lane) + " is not in its own mask, in " + place());
  if ((mask & warp.live) != mask) fail("the mask names lanes that have returned, in " + place());
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.where = where;
  } else if (std::strcmp(warp.operation, operation) != 0 || !same_place(warp.where, where)) {
    fail("lanes of one warp are in " + place() + " and in " + warp.operation + " at " + to_string(warp.where));
  }
  warp.lanes[lane] = {in, out, mask};
  warp.arrived |= 1u << lane;
  for (int other = 0; other < 32; ++other) {
    if (warp.waits(other) && warp.lanes[other].mask != mask) fail("lanes of one warp give different masks, in " + place());
  }
  if ((warp.arrived & mask) != mask) {
    wait(State::kInWarpOperation, where);
    return;
  }
  compute(mask, warp.lanes);
  warp.arrived = 0;
  for (int other = 0; other < 32; ++other) {
    if (other != lane && (mask >> other & 1)) wake(thread(self.warp() * 32 + other));
  }
}

struct Shuffled {
  const void* value;
  size_t bytes;
  int source;
};

void shuffle_bytes(unsigned mask, const void* value, void* out, size_t bytes, int source, const char* operation,
                   const Location& where) {
  const Shuffled in{value, bytes, source};
  together(mask, operation, where, &in, out, [](unsigned present, Lane(&lanes)[32]) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(present >> lane & 1)) continue;
      const Shuffled& own = *static_cast<const Shuffled*>(lanes[lane].in);
      if (present >> own.source & 1) {
        std::memcpy(lanes[lane].out, static_cast<const Shuffled*>(lanes[own.source].in)->value, own.bytes);
      } else {
        std::memset(lanes[lane].out, 0xff, own.bytes);
      }
    }
  });
}

void sync_warp(unsigned mask, const Location& where) {
  // Counted for the whole warp: with a mask of some lanes, an access that stays unordered against the others is not noticed.
  Warp& warp = warp_of(*running());
  struct Count {
    uint32_t* syncs;
  } count{&warp.syncs};
  together(mask, "__syncwarp", where, &count, nullptr,
           [](unsigned present, Lane(&lanes)[32]) { ++*static_cast<const Count*>(lanes[__builtin_ctz(present)].in)->syncs; });
}

bool all_of_warp(unsigned mask, bool predicate, const Location& where) {
  bool all = false;
  together(mask, "__all_sync", where, &predicate, &all, [](unsigned present, Lane(&lanes)[32]) {
    bool every = true;
    for (int lane = 0; lane < 32; ++lane) every &= !(present >> lane & 1) || *static_cast<const bool*>(lanes[lane].in);
    for (int lane = 0; lane < 32; ++lane) {
      if (present >> lane & 1) *static_cast<bool*>(lanes[lane].out) = every;
    }
  });
  return all;
}

int current_lane() { return running()->lane(); }

void multiply(Factor factor, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Location& where) {
  const Fragments in{a, b, c};
  const Compute compute = factor == Factor::kTf32       ? &multiply_tf32
                          : factor == Factor::kBFloat16 ? &multiply_16_bit<__nv_bfloat16>
                                                        : &multiply_16_bit<__half>;
  together(~0u, "mma.sync", where, &in, c, compute);
}

}  // namespace cuda_on_cpu
