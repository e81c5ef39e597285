/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Joins the pieces of row tiles that several CTAs shared in a batch-invariant call that folds
 * (etap_mla_fold_tree.h), in the order in which one CTA would have joined all of it in registers:
 *
 *   few CTAs, or many pieces   each warp some boxes: pieces -> shared memory, one after another
 *   else                       the warps of a unit: its pieces -> shared memory, all at once; each
 *                              some groups of pieces; each some blocks; one of them all blocks
 *
 * Joined parts take the place of their first piece.
 */
#pragma once

#include "etap_mla_fold.cuh"
#include "etap_mla_merge.cuh"

namespace etap {

template <class Traits>
class FoldMerge : MergeOfUnits<Traits> {
  using Base = MergeOfUnits<Traits>;
  using Base::count_, Base::kUnitsOfBox, Base::lane_, Base::params_, Base::rank_, Base::warp_;
  static constexpr int kUnits = Base::kUnitsPerRowTile;
  static constexpr int kRowTile = Traits::kRowTile;

  static constexpr int kFolded = 4;  // at once, at most: a group's pieces, a block's groups
  static_assert(kQuadLeaves <= kFolded && kBlockLeaves / kQuadLeaves <= kFolded);
  static constexpr int kPiecesOfBox = 8;  // at once

  template <int kUnitsTogether>
  struct Piece {
    float4 sum[kUnitsTogether][32];
    float4 rows[4];  // maximum and sum of two rows each
  };

 public:
  // As much as there is room for in the ring, which is free.
  union SharedStorage {
    static constexpr int kMostPieces = Traits::kRingBytes / int(sizeof(Piece<1>));
    Piece<1> pieces_of_units[kMostPieces];
    Piece<kUnitsOfBox> pieces_of_warp[kMergeWarps][kPiecesOfBox];
  };

  // For CTA `rank` of `count` that share the units.
  __device__ static void join_row_tile(Params const& params, SharedStorage& shared, int32_t rank,
                                       int32_t count, SplitRowTile const& split,
                                       FoldPieceList const& list) {
    FoldMerge(params, shared, rank, count).join_row_tile(split, list);
  }

 private:
  __device__ FoldMerge(Params const& params, SharedStorage& shared, int32_t rank, int32_t count)
      : Base(params, rank, count), shared_(shared) {}

  __device__ void join_row_tile(SplitRowTile const& split, FoldPieceList const& list) {
    int32_t log_units = 0;
    while (log_units < 3 && kUnits > count_ << log_units) ++log_units;
    bool const is_one_round = kUnits <= count_ << log_units;
    if (is_one_round && list.num_pieces << log_units <= SharedStorage::kMostPieces) {
      return join_units(split, list, log_units);
    }
#pragma unroll 1
    for (int32_t box = warp_ * count_ + rank_; box < kUnits / kUnitsOfBox;
         box += count_ * kMergeWarps) {
      this->write_box(join_box(list, box), split.descriptor, box / kCkvBoxes, box % kCkvBoxes);
    }
  }

  __device__ void join_units(SplitRowTile const& split, FoldPieceList const& list,
                             int32_t log_units) {
    int32_t const unit_of_cta = warp_ & ((1 << log_units) - 1);
    int32_t const unit = (rank_ << log_units) + unit_of_cta;
    bool const has_unit = unit < kUnits;
    int32_t const share = warp_ >> log_units, num_shares = kMergeWarps >> log_units;
    Piece<1>* const pieces = shared_.pieces_of_units + unit_of_cta * list.num_pieces;
    PieceSource const source(params_, unit, lane_);
#pragma unroll 4
    for (int32_t i = share; has_unit && i < list.num_pieces; i += num_shares) {
      copy_piece(pieces[i], source, list.pieces[i].slot);
    }
    cutlass::arch::cp_async_fence();
    cutlass::arch::cp_async_wait<0>();
    sync_math();
    auto const place_of_group = [&](int32_t group) { return list.begin_of_group[group]; };
    auto const place_of_block = [&](int32_t block) {
      return place_of_group(list.begin_of_block[block]);
    };
#pragma unroll 1
    for (int32_t group = share; has_unit && group < list.num_groups(); group += num_shares) {
      int32_t const first = place_of_group(group), count = place_of_group(group + 1) - first;
      if (count > 1) {
        auto const joined = fold_some(JoinedParts<1>::none(), pieces, count,
                                      [first](int32_t i) { return first + i; });
        write_piece(pieces[first], joined);
      }
    }
    sync_math();
#pragma unroll 1
    for (int32_t block = share; has_unit && block < list.num_blocks; block += num_shares) {
      int32_t const first = list.begin_of_block[block];
      int32_t const count = list.begin_of_block[block + 1] - first;
      if (count > 1) {
        auto const joined = fold_some(JoinedParts<1>::none(), pieces, count,
                                      [&](int32_t i) { return place_of_group(first + i); });
        write_piece(pieces[place_of_group(first)], joined);
      }
    }
    sync_math();
    if (!has_unit || share > 0) return;
    auto joined = JoinedParts<1>::none();
#pragma unroll 1
    for (int32_t block = 0; block < list.num_blocks; block += kFolded) {
      joined = fold_some(joined, pieces, min(list.num_blocks - block, kFolded),
                         [&](int32_t i) { return place_of_block(block + i); });
    }
    this->write_unit(joined, split.descriptor, unit);
  }

  // One after another; without branches, so that all powers of two are found at once.
  template <class Place>
  __device__ __forceinline__ JoinedParts<1> fold_some(JoinedParts<1> joined, Piece<1> const* pieces,
                                                      int32_t count, Place const& place) const {
    JoinedParts<1> parts[kFolded];
#pragma unroll
    for (int32_t i = 0; i < kFolded; ++i) parts[i] = read_piece(pieces[place(min(i, count - 1))]);
#pragma unroll
    for (int32_t i = 0; i < kFolded; ++i) {
      JoinedParts<1> next = joined;
      fold(next, parts[i]);
      auto const choose = [exists = i < count](float& own, float other) {
        own = exists ? other : own;
      };
      choose(joined.sum[0].x, next.sum[0].x);
      choose(joined.sum[0].y, next.sum[0].y);
      choose(joined.sum[0].z, next.sum[0].z);
      choose(joined.sum[0].w, next.sum[0].w);
      choose(joined.max.x, next.max.x);
      choose(joined.max.y, next.max.y);
      choose(joined.total.x, next.total.x);
      choose(joined.total.y, next.total.y);
    }
    return joined;
  }

  // Four units side by side.
  __device__ JoinedParts<kUnitsOfBox> join_box(FoldPieceList const& list, int32_t box) {
    using Parts = JoinedParts<kUnitsOfBox>;
    auto& pieces = shared_.pieces_of_warp[warp_];
    PieceSource const source(params_, kUnitsOfBox * box, lane_);
    Parts group = Parts::none(), block = Parts::none(), row_tile = Parts::none();
#pragma unroll 1
    for (int32_t first = 0; first < list.num_pieces; first += kPiecesOfBox) {
      int32_t const count = min(list.num_pieces - first, kPiecesOfBox);
#pragma unroll 1
      for (int32_t i = 0; i < count; ++i) {
        copy_piece(pieces[i], source, list.pieces[first + i].slot);
      }
      cutlass::arch::cp_async_fence();
      cutlass::arch::cp_async_wait<0>();
      __syncwarp();
#pragma unroll 1
      for (int32_t i = 0; i < count; ++i) {
        fold(group, read_piece(pieces[i]));
        if (!list.pieces[first + i].ends_group) continue;
        fold(block, group);
        group = Parts::none();
        if (!list.pieces[first + i].ends_block) continue;
        fold(row_tile, block);
        block = Parts::none();
      }
      __syncwarp();  // their places are filled again
    }
    return row_tile;
  }

  // Where a lane finds its numbers of the units from `unit` on, in slot 0.
  struct PieceSource {
    float const* numbers;
    float2 const* rows;

    __device__ PieceSource(Params const& params, uint32_t unit, int32_t lane) {
      int32_t const row_block = unit / Base::kUnitsPerBlock;
      numbers = params.partial_out +
                place_in_part<kRowTile>(unit / 4 % kCkvBoxes, row_block, unit % 4, lane);
      rows = params.partial_ml + row_block * 8 + 2 * lane;
      // Not put together again for each piece, which would take longer than to ask for it.
      asm("" : "+l"(numbers), "+l"(rows));
    }
  };

  template <int kUnitsTogether>
  __device__ void copy_piece(Piece<kUnitsTogether>& piece, PieceSource const& source,
                             int32_t slot) const {
    using namespace cutlass::arch;
    float const* const numbers = source.numbers + int64_t(slot) * (kHeadDimCkv * kRowTile);
#pragma unroll
    for (int32_t j = 0; j < kUnitsTogether; ++j) {
      cp_async<16, CacheOperation::Global>(&piece.sum[j][lane_], numbers + j * 32 * 4);
    }
    if (lane_ < 4) {
      cp_async<16, CacheOperation::Global>(&piece.rows[lane_],
                                           source.rows + int64_t(slot) * kRowTile);
    }
  }

  template <int kUnitsTogether>
  __device__ JoinedParts<kUnitsTogether> read_piece(Piece<kUnitsTogether> const& piece) const {
    JoinedParts<kUnitsTogether> parts;
#pragma unroll
    for (int32_t j = 0; j < kUnitsTogether; ++j) parts.sum[j] = piece.sum[j][lane_];
    float4 const rows = piece.rows[lane_ % 4];
    parts.max = {rows.x, rows.z};
    parts.total = {rows.y, rows.w};
    return parts;
  }

  __device__ void write_piece(Piece<1>& piece, JoinedParts<1> const& parts) const {
    __syncwarp();  // all have read what is there
    piece.sum[0][lane_] = parts.sum[0];
    if (lane_ < 4) {
      piece.rows[lane_] = make_float4(parts.max.x, parts.total.x, parts.max.y, parts.total.y);
    }
  }

  template <int kUnitsTogether>
  __device__ static void fold(JoinedParts<kUnitsTogether>& joined,
                              JoinedParts<kUnitsTogether> const& next) {
    RowJoin const row_0(joined.max.x, next.max.x), row_1(joined.max.y, next.max.y);
#pragma unroll
    for (int32_t i = 0; i < kUnitsTogether; ++i) {
      float4& sum = joined.sum[i];
      float4 const& other = next.sum[i];
      sum = {row_0(sum.x, other.x), row_1(sum.y, other.y), row_0(sum.z, other.z),
             row_1(sum.w, other.w)};
    }
    joined.total = {row_0(joined.total.x, next.total.x), row_1(joined.total.y, next.total.y)};
    joined.max = {row_0.max, row_1.max};
  }

  SharedStorage& shared_;
};

}  // namespace etap
