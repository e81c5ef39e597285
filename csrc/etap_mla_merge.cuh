/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Joins the parts of row tiles that several CTAs shared:
 *
 *   M = max m_p,  L = sum 2^(m_p - M) l_p,  O = sum 2^(m_p - M) O_p / L,  LSE = M + log2 L
 *
 * A unit is one accumulator fragment of a warp (16 columns of d_v x 8 rows). The warps of a CTA
 * take a unit each or, with warps to spare, share the parts of a unit, each with an M of its own
 * until the shares are added; with more units than warps, a warp takes a box of four side by side.
 *
 * The CTAs that have the parts do it at the end of the attention kernel, each a share of the units,
 * and look at the parts until they are there, or count them (etap_mla_merge_at_end.cuh). In
 * batch-invariant calls, where a CTA has parts of any row tiles, a kernel of its own does
 * (etap_mla_merge_kernel.cuh), and the number of shares, and so the order of all sums, depends on
 * the number of parts alone; where there are more warps than shares, some have nothing to do.
 * Kernels that fold join in yet another order (etap_mla_fold_merge.cuh).
 */
#pragma once

#include "etap_mla_partial.cuh"

namespace etap {

constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * 32;
static_assert(kMergeThreads == kMathThreads, "the attention kernel's math threads merge, too");
constexpr int kMergeCtasPerSm = 2;

// Some parts of kUnits neighbouring units joined. A lane has two rows, 2 * (lane % 4) and the next.
template <int kUnits>
struct JoinedParts {
  // Columns lane / 4 and lane / 4 + 8 of each unit: (d, row), (d, row + 1), (d + 8, row), ...
  float4 sum[kUnits];
  float2 max, total;

  __device__ static JoinedParts none() { return {{}, {-INFINITY, -INFINITY}, {}}; }

  __device__ void rescale(float2 new_max) {
    float const f0 = rescale_factor(max.x, new_max.x), f1 = rescale_factor(max.y, new_max.y);
#pragma unroll
    for (float4& s : sum) s = {s.x * f0, s.y * f1, s.z * f0, s.w * f1};
    total = {total.x * f0, total.y * f1};
    max = new_max;
  }

  // Of one that is relative to another maximum.
  __device__ void add_scaled(JoinedParts const& other) {
    float const f0 = rescale_factor(other.max.x, max.x), f1 = rescale_factor(other.max.y, max.y);
#pragma unroll
    for (int32_t i = 0; i < kUnits; ++i) {
      sum[i].x += f0 * other.sum[i].x;
      sum[i].y += f1 * other.sum[i].y;
      sum[i].z += f0 * other.sum[i].z;
      sum[i].w += f1 * other.sum[i].w;
    }
    total.x += f0 * other.total.x;
    total.y += f1 * other.total.y;
  }

  __device__ void add(JoinedParts other) {
    float2 const new_max = {fmaxf(max.x, other.max.x), fmaxf(max.y, other.max.y)};
    rescale(new_max);
    other.rescale(new_max);
#pragma unroll
    for (int32_t i = 0; i < kUnits; ++i) {
      sum[i].x += other.sum[i].x;
      sum[i].y += other.sum[i].y;
      sum[i].z += other.sum[i].z;
      sum[i].w += other.sum[i].w;
    }
    total = {total.x + other.total.x, total.y + other.total.y};
  }
};

// What both merges have in common, this one and that of folded calls. Units are numbered block of 8
// rows, box of d_v, warp.
template <class Traits>
class MergeOfUnits {
 protected:
  using DType = typename Traits::DType;
  static constexpr int kRowTile = Traits::kRowTile;
  static constexpr int kRowBlocks = kRowTile / 8;
  static constexpr int kUnitsPerBlock = kCkvBoxes * 4;  // of 8 rows: boxes x warps of a warpgroup

 public:
  static constexpr int kUnitsPerRowTile = kRowBlocks * kUnitsPerBlock;
  static constexpr int kUnitsOfBox = 4;  // side by side: 64 columns

 protected:
  // For CTA `rank` of `count` that share the units.
  __device__ MergeOfUnits(Params const& params, int32_t rank, int32_t count)
      : params_(params), rank_(rank), count_(count) {}

  // Numbers of units and boxes have no sign: dividing them would take several instructions.
  __device__ void write_unit(JoinedParts<1> const& joined, MergeDescriptor const& descriptor,
                             uint32_t unit) {
    int32_t const row_block = unit / kUnitsPerBlock;
    int32_t const box = unit / 4 % kCkvBoxes, fragment_warp = unit % 4;
    uint2 const words = transpose_fragment<DType>(fragment(joined, 0), normalizer(joined.total.x),
                                                  normalizer(joined.total.y));
    int32_t const row = row_block * 8 + lane_ / 4;
    if (row < descriptor.num_rows) {
      DType* const out = output_row<DType>(params_, descriptor.packed_row + row) +
                         box * kBoxColumns + fragment_warp * 16;
      if constexpr (kHasColumnPairs<Traits>) {
        reinterpret_cast<uint2*>(out)[lane_ % 4] = interleave_columns(words);
      } else {
        reinterpret_cast<uint32_t*>(out)[lane_ % 4] = words.x;
        reinterpret_cast<uint32_t*>(out + 8)[lane_ % 4] = words.y;
      }
    }
    if (box == 0 && fragment_warp == 0) write_lse(joined, descriptor, row_block);
  }

  __device__ void write_box(JoinedParts<kUnitsOfBox> const& joined,
                            MergeDescriptor const& descriptor, int32_t row_block, int32_t box) {
    int32_t const row = row_block * 8 + lane_ / 4;
    bool const exists = row < descriptor.num_rows;
    DType* const out =
        output_row<DType>(params_, descriptor.packed_row + (exists ? row : 0)) + box * kBoxColumns;
    float const scale_0 = normalizer(joined.total.x), scale_1 = normalizer(joined.total.y);
    if constexpr (kHasColumnPairs<Traits>) {
#pragma unroll
      for (int32_t unit = 0; unit < kUnitsOfBox; ++unit) {
        uint2 const words =
            interleave_columns(transpose_fragment<DType>(fragment(joined, unit), scale_0, scale_1));
        if (exists) reinterpret_cast<uint2*>(out + unit * 16)[lane_ % 4] = words;
      }
    } else {
#pragma unroll
      for (int32_t unit = 0; unit < kUnitsOfBox; unit += 2) {
        write_fragments<DType>(fragment(joined, unit), fragment(joined, unit + 1), scale_0, scale_1,
                               out + unit * 16 + lane_ % 4 * 8, exists);
      }
    }
    if (box == 0) write_lse(joined, descriptor, row_block);
  }

  template <int kUnits>
  __device__ static OutputFragment fragment(JoinedParts<kUnits> const& joined, int32_t unit) {
    float4 const sum = joined.sum[unit];
    return {{sum.x, sum.y, sum.z, sum.w}};
  }

  template <int kUnits>
  __device__ void write_lse(JoinedParts<kUnits> const& joined, MergeDescriptor const& descriptor,
                            int32_t row_block) const {
    if (lane_ >= 4 || params_.lse == nullptr) return;
    int32_t const row = row_block * 8 + 2 * lane_;
    float* const lse = params_.lse + descriptor.packed_row + row;
    if (row < descriptor.num_rows) lse[0] = log_sum_exp(params_, joined.max.x, joined.total.x);
    if (row + 1 < descriptor.num_rows) {
      lse[1] = log_sum_exp(params_, joined.max.y, joined.total.y);
    }
  }

  Params const& params_;
  int32_t const rank_, count_;
  int32_t const warp_ = threadIdx.x / 32;
  int32_t const lane_ = threadIdx.x % 32;
};

// The parts that a merge joins.
struct PartsToJoin {
  void const* first_slot;       // numbers of the first slot's part
  int64_t end_of_patience = 0;  // if they are polled: on the SM's clock
  bool some_refer = false;      // to the workspace, if they are counted

  __device__ static PartsToJoin polled(void const* places, int64_t end_of_patience) {
    return {places, end_of_patience};
  }
  __device__ static PartsToJoin counted(void const* places, bool some_refer) {
    return {places, 0, some_refer};
  }
  __device__ static PartsToJoin in_workspace(Params const& params) { return {params.partial_out}; }
};

// kInPlaces: of parts in the places of a call; else of parts in the workspace.
template <class Traits, bool kInPlaces>
class Merge : MergeOfUnits<Traits> {
  using Base = MergeOfUnits<Traits>;
  using Base::count_, Base::kRowTile, Base::kUnitsPerBlock, Base::lane_, Base::kUnitsOfBox,
      Base::params_, Base::rank_, Base::warp_, Base::write_box, Base::write_unit;
  static constexpr bool kWaits = kInPlaces && kPollsParts<Traits>;
  static constexpr int kPartsInFlight = 8;
  static constexpr int kPartsInFlightOfBox = 4;
  static_assert(kMostFixedParts == kMergeWarps * kPartsInFlight);

 public:
  using Base::kUnitsPerRowTile;

  struct SharedStorage {
    JoinedParts<1> shares[kMergeWarps][32];
  };

  // For CTA `rank` of `count` that share the units.
  __device__ Merge(Params const& params, SharedStorage& shared, int32_t rank, int32_t count,
                   PartsToJoin const& parts)
      : Base(params, rank, count), shared_(shared), parts_(parts) {}

  // Of one row tile, by the CTAs that have its parts. Whether this warp found all parts that it
  // waited for; so below.
  __device__ bool join_row_tile(SplitRowTile const& split) {
    auto const find = [&split](int32_t) { return split; };
    if (kUnitsPerRowTile <= count_ * kMergeWarps) return join_units(kUnitsPerRowTile, 3, find);
    bool are_there = true;
    int32_t box = warp_ * count_ + rank_;
#pragma unroll 1
    for (; box < kUnitsPerRowTile / kUnitsOfBox; box += count_ * kMergeWarps) {
      are_there &= join_box(split, box);
    }
    return are_there;
  }

  // Units of several row tiles: `find` gives the i-th of these. At most 1 << most_log_units units
  // at once in a CTA; as few as leave none to a second round.
  template <class Find>
  __device__ bool join_units(int32_t num_units, int32_t most_log_units, Find const& find) {
    int32_t log_units = 0;
    while (log_units < most_log_units && num_units > count_ << log_units) ++log_units;
    bool are_there = true;
    int32_t first = rank_ << log_units;
    for (; first < num_units; first += count_ << log_units) {
      uint32_t const unit = first + (warp_ & ((1 << log_units) - 1));
      are_there &= join(find(unit / kUnitsPerRowTile), unit % kUnitsPerRowTile, log_units);
    }
    return are_there;
  }

 private:
  // Warp w of the CTA works on the parts w >> log_units, + num_shares, ... of its unit, if there
  // are so many shares.
  __device__ bool join(SplitRowTile const& split, uint32_t unit, int32_t log_units) {
    int32_t const share = warp_ >> log_units;
    int32_t const row_block = unit / kUnitsPerBlock;
    int32_t const box = unit / 4 % kCkvBoxes, fragment_warp = unit % 4;
    MergeDescriptor const& descriptor = split.descriptor;
    int32_t const num_shares =
        kInPlaces ? kMergeWarps >> log_units : 1 << log_merge_shares(descriptor.num_parts);

    auto joined = JoinedParts<1>::none();
    bool are_there = true;
    int32_t const first_part = share < num_shares ? share : descriptor.num_parts;
    for (int32_t part = first_part; part < descriptor.num_parts;
         part += kPartsInFlight * num_shares) {
      are_there &= join_parts<kPartsInFlight>(joined, descriptor.num_parts, slots_of(split.number),
                                              part, num_shares, box, row_block, fragment_warp);
    }
    bool const has_other_warps = log_units < 3;
    if (has_other_warps) are_there = add_shares(joined, share, num_shares, log_units, are_there);
    if (share == 0 && are_there) write_unit(joined, descriptor, unit);
    if (has_other_warps) sync_math();  // the next units use the same shared memory
    return are_there;
  }

  // Four units, with all parts; numbered as units are.
  __device__ bool join_box(SplitRowTile const& split, uint32_t number_of_box) {
    int32_t const box = number_of_box % kCkvBoxes;
    int32_t const row_block = number_of_box / kCkvBoxes;
    MergeDescriptor const& descriptor = split.descriptor;
    auto joined = JoinedParts<kUnitsOfBox>::none();
    bool are_there = true;
    for (int32_t part = 0; part < descriptor.num_parts; part += kPartsInFlightOfBox) {
      are_there &= join_parts<kPartsInFlightOfBox>(
          joined, descriptor.num_parts, slots_of(split.number), part, 1, box, row_block, 0);
    }
    if (are_there) write_box(joined, descriptor, row_block, box);
    return are_there;
  }

  // The parts' slots. Of a row tile that begins in CTA `number`, the beginning lies in that CTA's
  // second slot, every continuation in the first; in batch-invariant calls they follow each other.
  struct PartSlots {
    int32_t begin, stride;

    __device__ int32_t beginning() const { return begin + stride - 1; }
    __device__ int32_t continuation(int32_t part) const { return begin + part * stride; }
  };

  __device__ PartSlots slots_of(int32_t number) const {
    return kInPlaces ? PartSlots{2 * number, 2} : PartSlots{number * params_.most_parts, 1};
  }

  // Where a lane finds the same numbers of all parts: in slot 0, from which others are as far away
  // as slots are long.
  template <int kUnits>
  struct PartSource {
    using Fragments = etap::Fragments<kUnits, kInPlaces && kHasHalfParts<Traits>>;
    using Lane = typename Fragments::Lane;
    static constexpr int64_t kNumbersBytes =
        kInPlaces ? sizeof(PartPlaces<Traits>) : kHeadDimCkv * kRowTile * sizeof(float);
    static constexpr int64_t kRowsBytes =
        kInPlaces ? sizeof(PartPlaces<Traits>) : kRowTile * sizeof(float2);

    char const* numbers;
    char const* rows;

    // Of the fragment at `place`, and of the rows from `row` on.
    __device__ PartSource(Params const& params, void const* first_slot, int32_t place, int32_t row)
        : numbers(static_cast<char const*>(first_slot) + place / 4 * int32_t(sizeof(Lane))),
          rows((kInPlaces
                    ? static_cast<char const*>(first_slot) + offsetof(PartPlaces<Traits>, rows)
                    : reinterpret_cast<char const*>(params.partial_ml)) +
               row * int32_t(sizeof(float2))) {
      // Not put together again for each part, which would take longer than to load it.
      asm("" : "+l"(numbers), "+l"(rows));
    }
  };

  // As it was loaded.
  template <int kUnits>
  struct Part {
    typename PartSource<kUnits>::Fragments fragments;
    uint4 rows;  // maximum and sum of two

    __device__ static Part none() {
      uint32_t const lowest = __float_as_uint(-INFINITY);
      return {{}, {lowest, 0, lowest, 0}};
    }

    __device__ void load(PartSource<kUnits> const& source, int32_t slot) {
      using Source = PartSource<kUnits>;
      fragments.load(reinterpret_cast<typename Source::Lane const*>(source.numbers +
                                                                    slot * Source::kNumbersBytes));
      load_polled(reinterpret_cast<uint4 const*>(source.rows + slot * Source::kRowsBytes), rows);
    }

    __device__ float2 max() const { return {__uint_as_float(rows.x), __uint_as_float(rows.z)}; }
    __device__ float2 total() const { return {__uint_as_float(rows.y), __uint_as_float(rows.w)}; }
    __device__ uint32_t largest() const { return ::max(fragments.largest(), largest_word(rows)); }

    __device__ JoinedParts<kUnits> joined() const {
      JoinedParts<kUnits> result;
#pragma unroll
      for (int32_t unit = 0; unit < kUnits; ++unit) result.sum[unit] = fragments.fragment(unit);
      result.max = max();
      result.total = total();
      return result;
    }
  };

  // Adds parts first_part, + stride, ..., kInFlight of them or as many as there are: of their
  // fragment (box of d_v, 8-row block, warp), or of kUnits from there on. False if some are
  // missing.
  template <int kInFlight, int kUnits>
  __device__ bool join_parts(JoinedParts<kUnits>& joined, int32_t num_parts, PartSlots const& slots,
                             int32_t first_part, int32_t stride, int32_t box, int32_t row_block,
                             int32_t fragment_warp) {
    int32_t const place = place_in_part<kRowTile>(box, row_block, fragment_warp, lane_);
    PartSource<kUnits> const source(params_, parts_.first_slot, place,
                                    row_block * 8 + 2 * (lane_ % 4));
    Part<kUnits> parts[kInFlight];
    int32_t const first_slot = first_part == 0 ? slots.beginning() : slots.continuation(first_part);
    auto const for_each = [&](auto const& exists, auto const& f) {
#pragma unroll
      for (int32_t i = 0; i < kInFlight; ++i) {
        int32_t const part = first_part + i * stride;
        if (exists(part)) f(i, i == 0 ? first_slot : slots.continuation(part));
      }
    };
    auto const exists = [&](int32_t part) { return part < num_parts; };
    auto const load = [&](int32_t i, int32_t slot) { parts[i].load(source, slot); };
    bool const are_all = exists(first_part + (kInFlight - 1) * stride);
    if (!are_all) {
#pragma unroll
      for (Part<kUnits>& part : parts) part = Part<kUnits>::none();
    }
    Found found = kNumbers;
    if constexpr (kWaits) {
      do {
        for_each(exists, load);
        found = look_at(parts);
      } while (found == kNothing && clock64() < parts_.end_of_patience);
    } else {
      // As most are: without a question for each part, and with fewer instructions, all of which
      // count. But less than to bring instructions for both cases, where nothing else is waited
      // for.
      if (are_all) {
        for_each([](int32_t) { return true; }, load);
      } else {
        for_each(exists, load);
      }
      if (__builtin_expect(parts_.some_refer, 0)) found = look_at(parts);
    }
    raise_max(joined, parts);
    if (__builtin_expect(found == kPlacesInWorkspace, 0)) {
      __threadfence();  // these numbers were there before their places said so
      for_each(exists, [&](int32_t i, int32_t slot) {
        JoinedParts<kUnits> part = parts[i].joined();
        auto const* const floats =
            reinterpret_cast<float4 const*>(floats_of_slot<Traits>(params_, slot) + place);
#pragma unroll
        for (int32_t unit = 0; unit < kUnits; ++unit) {
          if (parts[i].fragments.is_in_workspace(unit)) part.sum[unit] = __ldcg(floats + unit * 32);
        }
        joined.add_scaled(part);
      });
      return true;
    }
#pragma unroll
    for (Part<kUnits> const& part : parts) joined.add_scaled(part.joined());
    return found != kNothing;
  }

  // In all places that a warp looks at numbers; in some the word that these are in the workspace;
  // in some nothing yet.
  enum Found { kNumbers, kPlacesInWorkspace, kNothing };

  template <int kInFlight, int kUnits>
  __device__ static Found look_at(Part<kUnits> const (&parts)[kInFlight]) {
    uint32_t largest = 0;
#pragma unroll
    for (Part<kUnits> const& part : parts) largest = max(largest, part.largest());
    if (__all_sync(0xffffffff, largest < kInWorkspace)) return kNumbers;
    return __all_sync(0xffffffff, largest < kEmpty) ? kPlacesInWorkspace : kNothing;
  }

  template <int kInFlight, int kUnits>
  __device__ static void raise_max(JoinedParts<kUnits>& joined,
                                   Part<kUnits> const (&parts)[kInFlight]) {
    float2 new_max = joined.max;
#pragma unroll
    for (Part<kUnits> const& part : parts) {
      new_max = {fmaxf(new_max.x, part.max().x), fmaxf(new_max.y, part.max().y)};
    }
    joined.rescale(new_max);
  }

  // Adds what the warps of the same unit have, in the order of their shares. Whether they, or those
  // of other units, all have what they waited for.
  __device__ bool add_shares(JoinedParts<1>& joined, int32_t share, int32_t num_shares,
                             int32_t log_units, bool are_there) {
    shared_.shares[warp_][lane_] = joined;
    if constexpr (kWaits) {
      are_there = !sync_math_or(!are_there);
    } else {
      sync_math();
    }
    if (share > 0) return are_there;
    int32_t const end = num_shares << log_units;
    for (int32_t warp = warp_ + (1 << log_units); warp < end; warp += 1 << log_units) {
      joined.add(shared_.shares[warp][lane_]);
    }
    return are_there;
  }

  SharedStorage& shared_;
  PartsToJoin const parts_;
};

}  // namespace etap
