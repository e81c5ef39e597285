/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * What a CTA leaves of a row tile that it shares with others: O^T of its part, in accumulator
 * fragments (16 columns of d_v x 8 rows), four numbers a lane; of each row the maximum and the sum.
 *
 * A fence and a word that all is there would take longer than the parts themselves. So who needs
 * them looks at their places until something stands there: these are empty before. Calls have two
 * sets of places in turns, and each empties those of the next call, which the call before filled.
 * Row tiles of 64 have larger parts, and emptying their places takes longer than it spares: these
 * are counted, and have one set of places.
 *
 * Next to a result of bf16 the numbers are fp16: their error is an eighth of that of rounding the
 * result. Those of a warp's fragments that do not suit fp16 are left in the workspace, in float32,
 * and a word in their places says so. Next to a result of fp16 they are float32. So they are in
 * batch-invariant calls, whose parts lie in the workspace, and are counted.
 */
#pragma once

#include <cuda_fp16.h>

#include "etap_mla_math_thread.cuh"
#include "etap_mla_output.cuh"

namespace etap {

// Of a result in fp16, parts in fp16 would double the error.
template <class Traits>
constexpr bool kHasHalfParts = std::is_same_v<typename Traits::DType, cutlass::bfloat16_t>;

template <class Traits>
constexpr bool kPollsParts = Traits::kRowTile < 64;

// Words in the places of a part. No instruction makes such numbers: NaN are 0x7fffffff in float32
// and 0x7fff in fp16.
constexpr uint32_t kEmpty = 0xffffffff;
constexpr uint32_t kInWorkspace = 0xfffefffe;  // in fp16; larger than all numbers, but not kEmpty

template <class Traits>
struct alignas(128) PartPlaces {
  static constexpr int kNumbersOfWord = kHasHalfParts<Traits> ? 2 : 1;
  uint32_t numbers[kHeadDimCkv * Traits::kRowTile / kNumbersOfWord];
  float2 rows[Traits::kRowTile];  // maximum (base 2) and sum
};

// Those of all CTAs, two slots each.
template <class Traits>
constexpr int kSetsOfPlaces = kPollsParts<Traits> ? 2 : 1;

template <class Traits>
__device__ __forceinline__ PartPlaces<Traits>* places_of_call(Params const& params, uint32_t call) {
  auto* const places = static_cast<PartPlaces<Traits>*>(params.parts);
  return kPollsParts<Traits> ? places + call % 2 * 2 * gridDim.x : places;
}

// The places of the next call's parts: of this CTA's two slots those that the call before has used.
// By `threads` threads.
template <class Traits>
__device__ __forceinline__ void empty_parts_of_next_call(Params const& params,
                                                         MergeWork const& merge, int32_t thread,
                                                         int32_t threads) {
  constexpr int32_t kWords = sizeof(PartPlaces<Traits>) / sizeof(uint4);
  auto* const slots = places_of_call<Traits>(params, merge.call + 1) + 2 * blockIdx.x;
  uint32_t const used = merge.slots_used_before;
#pragma unroll
  for (int32_t i = 0; i < 2; ++i) {
    if ((used >> i & 1) == 0) continue;
    auto* const words = reinterpret_cast<uint4*>(slots + i);
#pragma unroll 4
    for (int32_t word = thread; word < kWords; word += threads) {
      words[word] = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
    }
  }
}

// A number that is NaN whichever way, but no word that means something else.
__device__ __forceinline__ uint32_t word_of(float number) {
  return min(__float_as_uint(number), kInWorkspace - 1);
}

// For others, who may look at it at any time, and by them.
__device__ __forceinline__ void store_polled(uint32_t* target, uint2 words) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(target), "r"(words.x),
               "r"(words.y)
               : "memory");
}
__device__ __forceinline__ void load_polled(uint2 const* source, uint2& words) {
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(words.x), "=r"(words.y)
               : "l"(source)
               : "memory");
}
__device__ __forceinline__ void load_polled(uint4 const* source, uint4& words) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(source)
               : "memory");
}

// Number of a part in front of those of lane `lane` in fragment (box of d_v, 8-row block, warp).
template <int kRowTile>
__device__ __forceinline__ int32_t place_in_part(int32_t box, int32_t row_block, int32_t warp,
                                                 int32_t lane) {
  int32_t const fragment = (box * (kRowTile / 8) + row_block) * 4 + warp;
  return (fragment * 32 + lane) * 4;
}

// The larger magnitude of each half of two words of fp16; NaN do not count.
__device__ __forceinline__ __half2 larger_magnitudes(__half2 largest, uint32_t numbers) {
  return __hmax2(largest, __habs2(reinterpret_cast<__half2 const&>(numbers)));
}
__device__ __forceinline__ __half2 larger_magnitudes(__half2 largest, uint2 numbers) {
  return larger_magnitudes(larger_magnitudes(largest, numbers.x), numbers.y);
}

// What a thread has of a part where tokens are on M, as store_part() wants it. `output(box, block,
// i)`: number i of a fragment, as OutputFragment has it.
template <class Traits, class Output>
struct NumbersOfPart {
  static constexpr int kChunks =
      kHasHalfParts<Traits> && Traits::kRowTile > 16 ? Traits::kRowTile / 16 : 1;
  MathThread const& thread;
  Output const& output;

  // f(place, box, 8-row block)
  template <class Function>
  __device__ __forceinline__ void for_each_fragment(int32_t chunk, Function const& f) const {
    constexpr int32_t kBoxes = kBoxesPerWarpgroup / kChunks;
    int32_t const lane = thread.fresh_lane();
#pragma unroll
    for (int32_t box = chunk * kBoxes; box < (chunk + 1) * kBoxes; ++box) {
#pragma unroll
      for (int32_t block = 0; block < Traits::kRowTile / 8; ++block) {
        int32_t const box_of_tile = 2 * box + thread.warpgroup;
        f(place_in_part<Traits::kRowTile>(box_of_tile, block, thread.warp, lane), box, block);
      }
    }
  }

  template <class Function>
  __device__ __forceinline__ void as_floats(int32_t chunk, Function const& f) const {
    for_each_fragment(chunk, [&](int32_t place, int32_t box, int32_t block) {
      f(place, make_float4(output(box, block, 0), output(box, block, 1), output(box, block, 2),
                           output(box, block, 3)));
    });
  }

  template <class Function>
  __device__ __forceinline__ void as_halves(int32_t chunk, Function const& f) const {
    for_each_fragment(chunk, [&](int32_t place, int32_t box, int32_t block) {
      f(place, make_uint2(pack<cutlass::half_t>(output(box, block, 0), output(box, block, 1)),
                          pack<cutlass::half_t>(output(box, block, 2), output(box, block, 3))));
    });
  }

  __device__ __forceinline__ __half2 largest(int32_t chunk) const {
    __half2 largest = {};
    as_halves(chunk, [&](int32_t, uint2 halves) { largest = larger_magnitudes(largest, halves); });
    return largest;
  }
};

// Whether fragments, of whose numbers these are the largest, suit fp16, which has numbers below
// 2^16; of small ones no more than 2^-25 is lost, which is little beside a largest one of 2^-8 or
// more.
__device__ __forceinline__ bool suit_fp16(__half2 largest) {
  constexpr uint32_t kInfinity = 0x7c00, kLeast = (15 - 8) << 10;  // 2^-8
  uint32_t const bits = reinterpret_cast<uint32_t const&>(largest);
  uint32_t const of_warp = __reduce_max_sync(0xffffffff, max(bits & 0xffff, bits >> 16));
  return of_warp - kLeast < kInfinity - kLeast;
}

// Numbers of a part in the workspace.
template <class Traits>
__device__ __forceinline__ float* floats_of_slot(Params const& params, int32_t slot) {
  return params.partial_out + slot * (kHeadDimCkv * Traits::kRowTile);
}

// Where a CTA leaves a part.
template <class Traits>
struct PartSlot {
  Params const& params;
  MergeWork& merge;
  int32_t const slot;
  PartPlaces<Traits>& places;

  __device__ __forceinline__ PartSlot(Params const& params, MergeWork& merge, int32_t slot)
      : params(params),
        merge(merge),
        slot(slot),
        places(places_of_call<Traits>(params, merge.call)[slot]) {}
};

template <class Traits, class Numbers>
__device__ __forceinline__ void store_in_workspace(PartSlot<Traits> const& part,
                                                   Numbers const& numbers, int32_t chunk) {
  float* const floats = floats_of_slot<Traits>(part.params, part.slot);
  numbers.as_floats(chunk, [floats](int32_t place, float4 const& values) {
    *reinterpret_cast<float4*>(floats + place) = values;
  });
}

// The same, and a word in the places; who counts parts is told that there are such words, who polls
// looks at all of them.
template <class Traits, class Numbers>
__device__ __forceinline__ void refer_to_workspace(PartSlot<Traits> const& part,
                                                   Numbers const& numbers, int32_t chunk) {
  if constexpr (!kPollsParts<Traits>) part.merge.refers_to_workspace = true;
  store_in_workspace(part, numbers, chunk);
  __threadfence();
  uint32_t* const words = part.places.numbers;
  numbers.as_halves(chunk, [words](int32_t place, uint2) {
    store_polled(words + place / 2, make_uint2(kInWorkspace, kInWorkspace));
  });
}

// Chunks of a part that is polled: there are not the registers to have all of it in fp16 while it
// is not known whether fp16 will do.
template <class Traits, class Numbers>
__device__ __forceinline__ void store_polled_halves(PartSlot<Traits> const& part,
                                                    Numbers const& numbers) {
  uint32_t* const words = part.places.numbers;
#pragma unroll
  for (int32_t chunk = 0; chunk < Numbers::kChunks; ++chunk) {
    if (__builtin_expect(suit_fp16(numbers.largest(chunk)), 1)) {
      numbers.as_halves(
          chunk, [words](int32_t place, uint2 halves) { store_polled(words + place / 2, halves); });
    } else {
      refer_to_workspace(part, numbers, chunk);
    }
  }
}

// Of one that is counted, which nobody looks at yet: it is stored before it is known whether fp16
// will do, which takes less time.
template <class Traits, class Numbers>
__device__ __forceinline__ void store_counted_halves(PartSlot<Traits> const& part,
                                                     Numbers const& numbers) {
  uint32_t* const words = part.places.numbers;
  __half2 largest = {};
#pragma unroll
  for (int32_t chunk = 0; chunk < Numbers::kChunks; ++chunk) {
    numbers.as_halves(chunk, [words, &largest](int32_t place, uint2 halves) {
      *reinterpret_cast<uint2*>(words + place / 2) = halves;
      largest = larger_magnitudes(largest, halves);
    });
  }
  if (__builtin_expect(suit_fp16(largest), 1)) return;
#pragma unroll
  for (int32_t chunk = 0; chunk < Numbers::kChunks; ++chunk) {
    refer_to_workspace(part, numbers, chunk);
  }
}

template <class Traits, class Numbers>
__device__ __forceinline__ void store_floats(PartSlot<Traits> const& part, Numbers const& numbers) {
  uint32_t* const words = part.places.numbers;
#pragma unroll
  for (int32_t chunk = 0; chunk < Numbers::kChunks; ++chunk) {
    numbers.as_floats(chunk, [words](int32_t place, float4 const& values) {
      store_polled(words + place, make_uint2(word_of(values.x), word_of(values.y)));
      store_polled(words + place + 2, make_uint2(word_of(values.z), word_of(values.w)));
    });
  }
}

// Leaves what a warp has of a part, in Numbers::kChunks of some fragments each. `numbers` gives a
// chunk with each place in a part of which this thread has the numbers:
//   numbers.as_floats(chunk, f)   f(place, float4)
//   numbers.as_halves(chunk, f)   f(place, uint2)
//   numbers.largest(chunk)        their magnitudes, as fp16, if parts are polled
template <class Traits, class Numbers>
__device__ __forceinline__ void store_part(PartSlot<Traits> const& part, Numbers const& numbers) {
  // As they are: but if it is not said here, behind the loop over tiles, ptxas may keep what is the
  // same for all lanes out of uniform registers in that loop (scripts/TUNING.md).
  __syncwarp();
  if (is_batch_invariant(part.params)) {
#pragma unroll
    for (int32_t chunk = 0; chunk < Numbers::kChunks; ++chunk) {
      store_in_workspace(part, numbers, chunk);
    }
  } else if constexpr (!kHasHalfParts<Traits>) {
    store_floats(part, numbers);
  } else if constexpr (kPollsParts<Traits>) {
    store_polled_halves(part, numbers);
  } else {
    store_counted_halves(part, numbers);
  }
}

// Of a row: maximum (base 2) and sum.
template <class Traits>
__device__ __forceinline__ void store_row_of_part(PartSlot<Traits> const& part, int32_t row,
                                                  float max, float sum) {
  if (!is_batch_invariant(part.params)) {
    store_polled(reinterpret_cast<uint32_t*>(&part.places.rows[row]),
                 make_uint2(word_of(max), word_of(sum)));
  } else {
    part.params.partial_ml[part.slot * Traits::kRowTile + row] = make_float2(max, sum);
  }
}

__device__ __forceinline__ uint32_t largest_word(uint2 const& words) {
  return max(words.x, words.y);
}
__device__ __forceinline__ uint32_t largest_word(uint4 const& words) {
  return max(max(words.x, words.y), max(words.z, words.w));
}

// What a lane has of neighbouring fragments, as it lies in memory, so that no load waits for what
// is made of another: in columns d = lane / 4 and d + 8, (d, row), (d, row + 1), (d + 8, row),
// (d + 8, row + 1).
template <int kFragments, bool kAreHalves>
struct Fragments {
  using Lane = std::conditional_t<kAreHalves, uint2, uint4>;
  Lane numbers[kFragments];

  __device__ __forceinline__ void load(Lane const* source) {
#pragma unroll
    for (int32_t i = 0; i < kFragments; ++i) load_polled(source + i * 32, numbers[i]);
  }

  __device__ __forceinline__ uint32_t largest() const {
    uint32_t largest = 0;
#pragma unroll
    for (Lane const& words : numbers) largest = max(largest, largest_word(words));
    return largest;
  }

  __device__ __forceinline__ bool is_in_workspace(int32_t i) const {
    return kAreHalves && numbers[i].x == kInWorkspace;
  }

  __device__ __forceinline__ float4 fragment(int32_t i) const {
    if constexpr (kAreHalves) {
      float2 const first = unpack<cutlass::half_t>(numbers[i].x);
      float2 const second = unpack<cutlass::half_t>(numbers[i].y);
      return {first.x, first.y, second.x, second.y};
    } else {
      return reinterpret_cast<float4 const&>(numbers[i]);
    }
  }
};

}  // namespace etap
