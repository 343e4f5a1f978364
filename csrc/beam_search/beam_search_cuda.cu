// CUDA kernels of beam_topk: a block of threads for each piece of a row, then a warp for each sentence.
//
// As on the CPU a row is read once, in sections that leave their highest logit and sum of exponentials wherever the row
// is cut, so that the batch cannot be seen in the result. A block keeps the candidates above a threshold in shared
// memory, as unordered as its threads find them, and ranks them against each other when they have become too many.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "beam_search_tensors.h"
#include "common/cuda_utils.cuh"

namespace condgen_fast::beam_search {
namespace {

// A token and its logit in one number: the higher logit is the greater, of equal ones the lower token.
using Candidate = uint64_t;

constexpr int kThreads = 256;
constexpr int kPerThread = 8;  // logits of a tile
constexpr int kTile = kThreads * kPerThread;
constexpr int kTilesInSection = 2;
constexpr int64_t kSection = kTile * kTilesInSection;
constexpr int kSpare = 256;  // candidates beyond k before they are ranked
constexpr int64_t kMostCandidates = 1024;
constexpr int kBlocksPerProcessor = 4;  // to aim at where rows are few

struct Sections {
  int64_t pieces;   // of a row
  int64_t per_row;  // sections
  int64_t per_piece;
  int64_t kept;  // candidates of a piece
  // scratch
  Candidate* best;     // [B * K, pieces, kept] descending
  float* highest;      // [B * K, per_row]
  float* sums;         // [B * K, per_row]
  struct List* lists;  // [B * K, pieces, and one more where totals are adjusted]
};

// The candidates of one piece while they are merged.
struct List {
  float highest, log_sum;  // of the row; log_sum is NaN for an empty beam
  float last_total;        // of the candidate that went into the result last
  int used;                // how many did
  Candidate last_key;
};

__device__ float minus_infinity() { return -__int_as_float(0x7f800000); }

__device__ Candidate candidate(float logit, int64_t token) {
  const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 and 0 are one value
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Candidate>(ordered) << 32 | static_cast<unsigned>(~token);
}

__device__ float logit_of(Candidate candidate) {
  const unsigned ordered = static_cast<unsigned>(candidate >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ int64_t token_of(Candidate candidate) { return static_cast<unsigned>(~candidate); }

// What a beam is restricted to, and which of its totals are changed.
template <class Logit>
struct Lists {
  const int64_t *adjusted, *allowed;
  const float* amounts;
  int64_t adjustments, allowed_count;
  bool restricted;

  __device__ Lists(const Arguments<Logit>& arguments, int64_t b, int64_t i)
      : adjusted(nullptr),
        allowed(nullptr),
        amounts(nullptr),
        adjustments(arguments.adjustments),
        allowed_count(0),
        restricted(false) {
    if (adjustments > 0) {
      const int64_t offset = b * arguments.adjusted_sentence_stride + i * arguments.adjusted_beam_stride;
      adjusted = arguments.adjusted + offset;
      amounts = arguments.amounts + offset;
    }
    if (arguments.first != nullptr) {
      const int64_t first = arguments.first[b * arguments.beams + i];
      restricted = first >= 0;
      if (restricted) {
        allowed = arguments.allowed + first;
        allowed_count = arguments.last[b * arguments.beams + i] - first;
      }
    }
  }

  __device__ bool is_adjusted(int64_t token) const {
    for (int64_t j = 0; j < adjustments; ++j) {
      if (adjusted[j] == token) return true;
    }
    return false;
  }

  __device__ bool is_allowed(int64_t token) const {
    for (int64_t j = 0; j < allowed_count; ++j) {
      if (allowed[j] == token) return true;
    }
    return !restricted;
  }
};

// A thread's share of a tile. Elements beyond the end, and NaN, are -inf.
template <class Logit, bool kAligned>
struct Share {
  static constexpr int kPack = 16 / sizeof(Logit);  // what one load brings
  float x[kPerThread];

  // Position of element e in the tile; ascending in e.
  static __device__ int position(int e) {
    return e / kPack * kThreads * kPack + static_cast<int>(threadIdx.x) * kPack + e % kPack;
  }

  __device__ void load(const Logit* row, int64_t tile, int64_t end) {
#pragma unroll
    for (int first = 0; first < kPerThread; first += kPack) {
      const int64_t from = tile + position(first);
      if (kAligned && from + kPack <= end) {
        const uint4 raw = __ldg(reinterpret_cast<const uint4*>(row + from));
        const Logit* values = reinterpret_cast<const Logit*>(&raw);
#pragma unroll
        for (int i = 0; i < kPack; ++i) x[first + i] = static_cast<float>(values[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          x[first + i] = from + i < end ? static_cast<float>(row[from + i]) : minus_infinity();
        }
      }
    }
#pragma unroll
    for (float& value : x) value = value == value ? value : minus_infinity();
  }
};

// Keys above which k candidates are known to be, and those found so far.
struct Best {
  Candidate* keys;    // [k + kSpare + kTile] shared
  Candidate* sorted;  // [max(k, kThreads)] shared
  int* count;         // shared
  int k;

  // Leaves the k best in `sorted`, descending, and returns how many there are. Keys are different from each other.
  __device__ int rank() const {
    const int found = *count;
    for (int i = threadIdx.x; i < found; i += kThreads) {
      const Candidate mine = keys[i];
      int above = 0;
      for (int j = 0; j < found; ++j) above += keys[j] > mine;
      if (above < k) sorted[above] = mine;
    }
    __syncthreads();
    return found < k ? found : k;
  }

  // Keeps the k best only and returns the last of them.
  __device__ Candidate prune() const {
    const int kept = rank();
    for (int i = threadIdx.x; i < kept; i += kThreads) keys[i] = sorted[i];
    if (threadIdx.x == 0) *count = kept;
    __syncthreads();
    return sorted[kept - 1];
  }
};

// The k-th highest of the threads' keys, if there are k threads: at least k candidates are not below it.
__device__ Candidate first_bound(Candidate mine, Candidate* shared, int k) {
  if (k > kThreads) return 0;
  shared[threadIdx.x] = mine;
  __syncthreads();
  int above = 0;
  for (int j = 0; j < kThreads; ++j) above += shared[j] > mine || (shared[j] == mine && j < threadIdx.x);
  __syncthreads();
  if (above == k - 1) shared[0] = mine;
  __syncthreads();
  const Candidate bound = shared[0];
  __syncthreads();
  return bound;
}

// Writes what the section of all threads comes to: its highest logit, its sum of 2^((logit - highest) * scale).
__device__ void finish_section(float highest, float sum, float scale, float* shared, float* out_highest,
                               float* out_sum) {
  constexpr int kWarps = kThreads / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const float warp_top = warp_max(highest);
  if (lane == 0) shared[warp] = warp_top;
  __syncthreads();
  float top = shared[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) top = shared[i] > top ? shared[i] : top;
  const float part = highest > minus_infinity() ? sum * exp2f((highest - top) * scale) : 0.0f;
  const float warp_total = warp_sum(part);
  if (lane == 0) shared[kWarps + warp] = warp_total;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int i = 0; i < kWarps; ++i) total += shared[kWarps + i];
    *out_highest = top;
    *out_sum = total;
  }
}

template <class Logit, bool kAligned>
__global__ void __launch_bounds__(kThreads) scan_kernel(Arguments<Logit> arguments, Sections sections) {
  extern __shared__ Candidate candidates[];
  __shared__ float partial[2 * kThreads / kWarpSize];
  __shared__ int count;
  const int64_t row = blockIdx.x / sections.pieces, piece = blockIdx.x % sections.pieces;
  if (!isfinite(arguments.scores[row])) return;
  const int k = static_cast<int>(sections.kept);
  Best best{candidates, candidates + k + kSpare + kTile, &count, k};
  if (threadIdx.x == 0) count = 0;
  __syncthreads();

  const Logit* logits = arguments.logits + row / arguments.beams * arguments.sentence_stride +
                        row % arguments.beams * arguments.beam_stride;
  const Lists<Logit> lists(arguments, row / arguments.beams, row % arguments.beams);
  const int64_t begin = piece * sections.per_piece * kSection;
  const int64_t end = min(begin + sections.per_piece * kSection, arguments.vocab);
  Candidate threshold = 0;
  float highest = minus_infinity(), sum = 0.0f;
  Share<Logit, kAligned> next;
  next.load(logits, begin, end);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const Share<Logit, kAligned> share = next;
    if (tile + kTile < end) next.load(logits, tile + kTile, end);

    float top = highest;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) top = share.x[e] > top ? share.x[e] : top;
    if (top > minus_infinity()) {
      if (highest > minus_infinity()) sum *= exp2f((highest - top) * arguments.power_scale);
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) sum += exp2f((share.x[e] - top) * arguments.power_scale);
      highest = top;
    }

    if (tile == begin && !lists.restricted) {
      float value = share.x[0];
      int place = 0;
#pragma unroll
      for (int e = 1; e < kPerThread; ++e) {
        if (share.x[e] > value) {
          value = share.x[e];
          place = e;
        }
      }
      const int64_t token = tile + share.position(place);
      const bool counts = token < end && value > minus_infinity() && !lists.is_adjusted(token);
      const Candidate bound = first_bound(counts ? candidate(value, token) : 0, best.sorted, k);
      threshold = bound > 0 ? bound - 1 : 0;  // the bound's logit, as its low half is never 0
    }
    const float least = lists.restricted ? -minus_infinity()
                        : threshold > 0  ? logit_of(threshold)
                                         : __int_as_float(0xff7fffff);  // the lowest number
    int pushed = 0;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if (share.x[e] >= least && share.x[e] < -minus_infinity()) {
        const int64_t token = tile + share.position(e);
        const Candidate key = candidate(share.x[e], token);
        if (key > threshold && !lists.is_adjusted(token)) {
          best.keys[atomicAdd(&count, 1)] = key;
          pushed = 1;
        }
      }
    }
    if (__syncthreads_or(pushed)) {
      const int found = count;
      __syncthreads();
      if (found > k + kSpare) threshold = best.prune();
    }

    const int64_t read = tile + kTile;
    if ((read - begin) % kSection == 0 || read >= end) {
      const int64_t section = row * sections.per_row + tile / kSection;
      finish_section(highest, sum, arguments.power_scale, partial, sections.highest + section, sections.sums + section);
      highest = minus_infinity();
      sum = 0.0f;
    }
  }

  for (int64_t first = 0; first < lists.allowed_count; first += kThreads) {
    const int64_t token = first + threadIdx.x < lists.allowed_count ? lists.allowed[first + threadIdx.x] : -1;
    int pushed = 0;
    if (token >= begin && token < end && !lists.is_adjusted(token)) {
      const Candidate key = candidate(static_cast<float>(logits[token]), token);
      if (logit_of(key) > minus_infinity() && key > threshold) {
        best.keys[atomicAdd(&count, 1)] = key;
        pushed = 1;
      }
    }
    if (__syncthreads_or(pushed)) {
      const int found = count;
      __syncthreads();
      if (found > k + kSpare) threshold = best.prune();
    }
  }

  __syncthreads();
  const int found = best.rank();
  Candidate* out = sections.best + blockIdx.x * sections.kept;
  for (int i = threadIdx.x; i < k; i += kThreads) out[i] = i < found ? best.sorted[i] : 0;
}

// The first of a list that is not in the result. A row has a list for each of its pieces and one for its adjusted
// tokens. Higher total goes first, then lower parent, then higher logit, then lower token.
struct Head {
  float total;
  int list;  // negative: none
  Candidate key;

  __device__ bool before(const Head& other, int per_row) const {
    if (list < 0 || other.list < 0) return list >= 0;
    if (total != other.total) return total > other.total;
    const int parent = list / per_row, other_parent = other.list / per_row;
    return parent != other_parent ? parent < other_parent : key > other.key;
  }
};

template <class Logit>
struct Merge {
  const Arguments<Logit>& arguments;
  const Sections& sections;
  const int64_t b;
  const int per_row;  // lists

  __device__ int64_t row(int list) const { return b * arguments.beams + list / per_row; }
  __device__ List& entry(int list) const { return sections.lists[b * arguments.beams * per_row + list]; }

  __device__ float total(int list, Candidate key) const {
    const List& of = entry(list);
    const float below = (logit_of(key) - of.highest) / arguments.temperature;
    return arguments.scores[row(list)] + (below - of.log_sum);
  }

  __device__ void open(int list) const {
    float top = minus_infinity();
    double sum = 0.0;
    if (isfinite(arguments.scores[row(list)])) {
      const float* highest = sections.highest + row(list) * sections.per_row;
      for (int64_t i = 0; i < sections.per_row; ++i) top = highest[i] > top ? highest[i] : top;
      for (int64_t i = 0; i < sections.per_row && isfinite(top); ++i) {
        if (highest[i] == minus_infinity()) continue;
        const double power = exp2f((highest[i] - top) * arguments.power_scale);
        sum += sections.sums[row(list) * sections.per_row + i] * power;
      }
    }
    entry(list) = {top, isfinite(top) ? static_cast<float>(log(sum)) : __int_as_float(0x7fffffff), 0.0f, 0, 0};
  }

  __device__ Head head(int list) const {
    const List& of = entry(list);
    if (isnan(of.log_sum)) return Head{0.0f, -1, 0};
    const int piece = list % per_row;
    if (piece == sections.pieces) return adjusted_head(list);
    if (of.used >= sections.kept) return Head{0.0f, -1, 0};
    const Candidate key = sections.best[(row(list) * sections.pieces + piece) * sections.kept + of.used];
    return key == 0 ? Head{0.0f, -1, 0} : Head{total(list, key), list, key};
  }

  // Adjusted tokens are few and not sorted: the best of those that come after the last.
  __device__ Head adjusted_head(int list) const {
    const int64_t i = list / per_row;
    const Lists<Logit> lists(arguments, b, i);
    const Logit* logits = arguments.logits + b * arguments.sentence_stride + i * arguments.beam_stride;
    const List& of = entry(list);
    const Head last{of.last_total, of.used > 0 ? list : -1, of.last_key};
    Head best{0.0f, -1, 0};
    for (int64_t j = 0; j < lists.adjustments; ++j) {
      const int64_t token = lists.adjusted[j];
      if (token < 0 || token >= arguments.vocab || !(lists.amounts[j] > minus_infinity())) continue;
      const Candidate key = candidate(static_cast<float>(logits[token]), token);
      if (!(logit_of(key) > minus_infinity())) continue;
      Head mine{total(list, key), list, key};
      for (int64_t other = 0; other < lists.adjustments; ++other) {
        if (lists.adjusted[other] == token) mine.total += lists.amounts[other];
      }
      if (!(mine.total > minus_infinity()) || !lists.is_allowed(token)) continue;
      if ((last.list < 0 || last.before(mine, per_row)) && mine.before(best, per_row)) best = mine;
    }
    return best;
  }
};

template <class Logit>
__global__ void __launch_bounds__(kWarpSize) merge_kernel(Arguments<Logit> arguments, Sections sections) {
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x;
  const int per_row = static_cast<int>(sections.pieces) + (arguments.adjustments > 0 ? 1 : 0);
  const int count = static_cast<int>(arguments.beams) * per_row;
  const Merge<Logit> merge{arguments, sections, b, per_row};
  const Head none{0.0f, -1, 0};

  Head mine = none;  // the first of this lane's lists
  for (int list = lane; list < count; list += kWarpSize) {
    merge.open(list);
    const Head head = merge.head(list);
    if (head.before(mine, per_row)) mine = head;
  }

  for (int64_t place = b * arguments.k; place < (b + 1) * arguments.k; ++place) {
    Head winner = mine;
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      Head other;
      other.total = __shfl_xor_sync(kWholeWarp, winner.total, distance);
      other.list = __shfl_xor_sync(kWholeWarp, winner.list, distance);
      other.key = __shfl_xor_sync(kWholeWarp, winner.key, distance);
      if (other.before(winner, per_row)) winner = other;
    }
    const bool real = winner.list >= 0 && winner.total > minus_infinity();
    if (lane == 0) {
      arguments.out_scores[place] = real ? winner.total : minus_infinity();
      arguments.out_parents[place] = real ? winner.list / per_row : 0;
      arguments.out_tokens[place] = real ? token_of(winner.key) : 0;
    }
    if (winner.list >= 0 && winner.list % kWarpSize == lane) {
      List& entry = merge.entry(winner.list);
      ++entry.used;
      entry.last_total = winner.total;
      entry.last_key = winner.key;
      mine = none;
      for (int list = lane; list < count; list += kWarpSize) {
        const Head head = merge.head(list);
        if (head.before(mine, per_row)) mine = head;
      }
    }
  }
}

int processors(int device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "beam_topk");
  return count;
}

template <class Logit>
void beam_topk(const Arguments<Logit>& arguments, int64_t batch, const Tensor& logits) {
  const OnDeviceOf device(logits);
  const int64_t rows = batch * arguments.beams;
  Sections sections{};
  sections.per_row = ceil_div(arguments.vocab, kSection);
  const int64_t wanted =
      ceil_div<int64_t>(kBlocksPerProcessor * processors(logits.get_device_index()), std::max<int64_t>(rows, 1));
  sections.per_piece =
      ceil_div(sections.per_row, std::clamp<int64_t>(wanted, 1, std::max<int64_t>(sections.per_row, 1)));
  sections.per_piece = std::max<int64_t>(sections.per_piece, 1);
  sections.pieces = std::max<int64_t>(ceil_div(sections.per_row, sections.per_piece), 1);
  sections.kept = std::min({arguments.k, arguments.vocab, sections.per_piece * kSection});
  CONDGEN_FAST_CHECK(sections.kept <= kMostCandidates, "k must be at most ", kMostCandidates, " on a GPU; got ",
                     arguments.k);
  CONDGEN_FAST_CHECK(rows * sections.pieces <= INT32_MAX, "logits must have at most ", INT32_MAX,
                     " rows on a GPU; got ", rows);

  // one allocation, the eight-byte members first
  const int64_t best_words = rows * sections.pieces * sections.kept,
                list_words = 3 * rows * (sections.pieces + (arguments.adjustments > 0 ? 1 : 0));
  Tensor scratch =
      torch::stable::new_empty(logits, {best_words + list_words + rows * sections.per_row}, ScalarType::Long);
  static_assert(sizeof(List) == 3 * sizeof(int64_t));
  auto* words = static_cast<int64_t*>(scratch.data_ptr());
  sections.best = reinterpret_cast<Candidate*>(words);
  sections.lists = reinterpret_cast<List*>(words + best_words);
  sections.highest = reinterpret_cast<float*>(words + best_words + list_words);
  sections.sums = sections.highest + rows * sections.per_row;

  if (sections.kept > 0 && rows > 0) {
    const size_t shared =
        sizeof(Candidate) * (sections.kept + kSpare + kTile + std::max<int64_t>(sections.kept, kThreads));
    constexpr int64_t kPack = 16 / sizeof(Logit);
    const bool aligned = reinterpret_cast<uintptr_t>(arguments.logits) % 16 == 0 &&
                         arguments.sentence_stride % kPack == 0 && arguments.beam_stride % kPack == 0;
    const auto kernel = aligned ? scan_kernel<Logit, true> : scan_kernel<Logit, false>;
    kernel<<<rows * sections.pieces, kThreads, shared, device.stream()>>>(arguments, sections);
    check_launch("beam_topk: scan");
  }
  merge_kernel<<<batch, kWarpSize, 0, device.stream()>>>(arguments, sections);
  check_launch("beam_topk: merge");
}

std::tuple<Tensor, Tensor, Tensor> beam_topk_cuda(const Tensor& logits, const Tensor& scores, int64_t k,
                                                  double temperature, const std::optional<Tensor>& adjusted,
                                                  const std::optional<Tensor>& amounts,
                                                  const std::optional<Tensor>& allowed,
                                                  const std::optional<Tensor>& first,
                                                  const std::optional<Tensor>& last) {
  return beam_topk_op<__half, __nv_bfloat16>(
      logits, scores, k, temperature, {adjusted, amounts, allowed, first, last},
      [&](const auto& arguments, int64_t batch) { beam_topk(arguments, batch, logits); });
}

}  // namespace
}  // namespace condgen_fast::beam_search

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CUDA, m) {
  m.impl("beam_topk", TORCH_BOX(&condgen_fast::beam_search::beam_topk_cuda));
}
