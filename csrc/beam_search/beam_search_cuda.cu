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
  struct List* lists;  // [B * K, pieces]
};

// The candidates of one piece while they are merged.
struct List {
  float highest, log_sum;  // of the row
  float total;             // of the first candidate that is not in the result
  int used;
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

    if (tile == begin) {
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
      const Candidate bound = first_bound(token < end ? candidate(value, token) : 0, best.sorted, k);
      threshold = bound > 0 ? bound - 1 : 0;  // the bound's logit, as its low half is never 0
    }
    const float least = threshold > 0 ? logit_of(threshold) : minus_infinity();
    int pushed = 0;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if (share.x[e] >= least) {
        const int64_t token = tile + share.position(e);
        const Candidate key = candidate(share.x[e], token);
        if (token < end && key > threshold) {
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

  __syncthreads();
  const int found = best.rank();
  Candidate* out = sections.best + blockIdx.x * sections.kept;
  for (int i = threadIdx.x; i < found; i += kThreads) out[i] = best.sorted[i];
}

// Whether list `a` goes before list `b`: higher total, then lower parent, then higher logit, then lower token.
struct Head {
  float total;
  int list;  // negative: none
  Candidate key;

  __device__ bool before(const Head& other, int pieces) const {
    if (list < 0 || other.list < 0) return list >= 0;
    if (total != other.total) return total > other.total;
    const int parent = list / pieces, other_parent = other.list / pieces;
    return parent != other_parent ? parent < other_parent : key > other.key;
  }
};

template <class Logit>
__global__ void __launch_bounds__(kWarpSize) merge_kernel(Arguments<Logit> arguments, Sections sections) {
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x;
  const int pieces = static_cast<int>(sections.pieces), count = static_cast<int>(arguments.beams) * pieces;
  List* lists = sections.lists + b * count;
  const Candidate* best = sections.best + b * count * sections.kept;
  const float* scores = arguments.scores + b * arguments.beams;

  // An empty beam has one list, of tokens in order: that of its first piece. `log_sum` is NaN then.
  auto candidates_of = [&](int list) -> int64_t {
    if (!isnan(lists[list].log_sum)) {
      const int64_t begin = list % pieces * sections.per_piece * kSection;
      return min(sections.kept, min(arguments.vocab - begin, sections.per_piece * kSection));
    }
    return list % pieces == 0 ? min(arguments.k, arguments.vocab) : 0;
  };
  auto head_of = [&](int list) {
    List& entry = lists[list];
    if (entry.used >= candidates_of(list)) return Head{0.0f, -1, 0};
    if (isnan(entry.log_sum)) return Head{minus_infinity(), list, candidate(minus_infinity(), entry.used)};
    return Head{entry.total, list, best[list * sections.kept + entry.used]};
  };
  auto update_total = [&](int list) {
    List& entry = lists[list];
    if (isnan(entry.log_sum) || entry.used >= candidates_of(list)) return;
    const float below = (logit_of(best[list * sections.kept + entry.used]) - entry.highest) / arguments.temperature;
    entry.total = scores[list / pieces] + (below - entry.log_sum);
  };

  Head mine{0.0f, -1, 0};  // the first of this lane's lists
  for (int list = lane; list < count; list += kWarpSize) {
    const int64_t row = b * arguments.beams + list / pieces;
    float top = minus_infinity();
    double sum = 0.0;
    if (isfinite(scores[list / pieces])) {
      const float* highest = sections.highest + row * sections.per_row;
      for (int64_t i = 0; i < sections.per_row; ++i) top = highest[i] > top ? highest[i] : top;
      for (int64_t i = 0; i < sections.per_row && isfinite(top); ++i) {
        if (highest[i] == minus_infinity()) continue;
        const double power = exp2f((highest[i] - top) * arguments.power_scale);
        sum += sections.sums[row * sections.per_row + i] * power;
      }
    }
    const float log_sum = isfinite(top) ? static_cast<float>(log(sum)) : __int_as_float(0x7fffffff);
    lists[list] = {top, log_sum, minus_infinity(), 0};
    update_total(list);
    const Head head = head_of(list);
    if (head.before(mine, pieces)) mine = head;
  }

  for (int64_t place = b * arguments.k; place < (b + 1) * arguments.k; ++place) {
    Head winner = mine;
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      Head other;
      other.total = __shfl_xor_sync(kWholeWarp, winner.total, distance);
      other.list = __shfl_xor_sync(kWholeWarp, winner.list, distance);
      other.key = __shfl_xor_sync(kWholeWarp, winner.key, distance);
      if (other.before(winner, pieces)) winner = other;
    }
    if (lane == 0) {
      arguments.out_scores[place] = winner.list < 0 ? minus_infinity() : winner.total;
      arguments.out_parents[place] = winner.list < 0 ? 0 : winner.list / pieces;
      arguments.out_tokens[place] = winner.list < 0 ? 0 : token_of(winner.key);
    }
    if (winner.list >= 0 && winner.list % kWarpSize == lane) {
      ++lists[winner.list].used;
      update_total(winner.list);
      mine = Head{0.0f, -1, 0};
      for (int list = lane; list < count; list += kWarpSize) {
        const Head head = head_of(list);
        if (head.before(mine, pieces)) mine = head;
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
  const int64_t best_words = rows * sections.pieces * sections.kept, list_words = rows * sections.pieces * 2;
  Tensor scratch =
      torch::stable::new_empty(logits, {best_words + list_words + rows * sections.per_row}, ScalarType::Long);
  static_assert(sizeof(List) == 2 * sizeof(int64_t));
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
                                                  double temperature) {
  return beam_topk_op<__half, __nv_bfloat16>(logits, scores, k, temperature, [&](const auto& arguments, int64_t batch) {
    beam_topk(arguments, batch, logits);
  });
}

}  // namespace
}  // namespace condgen_fast::beam_search

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CUDA, m) {
  m.impl("beam_topk", TORCH_BOX(&condgen_fast::beam_search::beam_topk_cuda));
}
