// The kernels of a GPU, emulated, against the CPU's: one warp a sentence must do what one thread does.
#include <algorithm>
#include <vector>

#include "beam_search/beam_update.h"
#include "testing.h"
#include "warp_emulation.h"
// after the emulation
#include "beam_search/warp.cuh"

namespace condgen_fast::beam_search {
namespace {

constexpr float kInfinity = INFINITY;

// Everything that an Update points to.
struct Search {
  Update u{};
  std::vector<int64_t> ends, banned, prefix_lengths, trie, sentences, chosen, progress, finished_ids, lattice_ids, bans,
      ranges, history, nodes;
  std::vector<float> norms, totals, finished_totals, lattice_totals;
  std::vector<char> flags;

  Update update() {
    u.ends = ends.data(), u.norms = norms.data(), u.banned = banned.data();
    u.prefix_lengths = prefix_lengths.data(), u.trie = trie.data();
    u.sentences = sentences.data(), u.chosen = chosen.data(), u.totals = totals.data();
    u.flags = reinterpret_cast<bool*>(flags.data());
    u.progress = progress.data(), u.finished_ids = finished_ids.data(), u.finished_totals = finished_totals.data();
    u.lattice_ids = lattice_ids.data(), u.lattice_totals = lattice_totals.data();
    u.bans = bans.data(), u.ranges = ranges.data(), u.history = history.data(), u.nodes = nodes.data();
    return u;
  }

  bool same_as(const Search& other) const {
    return sentences == other.sentences && chosen == other.chosen && totals == other.totals && flags == other.flags &&
           progress == other.progress && finished_ids == other.finished_ids &&
           finished_totals == other.finished_totals && lattice_ids == other.lattice_ids &&
           lattice_totals == other.lattice_totals && bans == other.bans && ranges == other.ranges &&
           history == other.history && nodes == other.nodes;
  }
};

int64_t any_of(std::initializer_list<int64_t> values) {
  return values.begin()[testing::random_int(0, static_cast<int64_t>(values.size()) - 1)];
}

Search random_search() {
  Search s;
  Update& u = s.u;
  const int64_t k = any_of({1, 3, 5, 31, 32, 33, 70}), groups = any_of({1, 1, 2});
  u.groups = groups, u.beams = k * groups, u.batch = any_of({1, 3}), u.steps = any_of({2, 6});
  u.rows = testing::random_int(1, u.batch), u.ranked = any_of({0, 1}), u.candidates = k * any_of({1, 2, 3});
  Rules& r = u.rules;
  r.n_best = testing::random_int(1, k), r.wanted = std::max(r.n_best, any_of({1, k, 2 * k}));
  r.stopping = any_of({kExact, kHeuristic, kFirst, kTopped}), r.min_length = any_of({0, 4}), r.rising = any_of({0, 1});
  r.cut_at_limit = any_of({0, 1}), r.in_order = any_of({0, 1}), r.by_rank = u.ranked ? any_of({0, 1}) : 0;
  u.capacity = r.wanted + any_of({0, k - 1});
  s.ends = {1, 2}, s.banned = {0, 1, 2};
  u.ends_count = 2, u.banned_count = 3, r.always_banned = 1;
  r.no_repeat_ngram = any_of({0, 1, 2});
  u.history_width = r.no_repeat_ngram > 0 ? u.steps + any_of({0, 1}) : 0;
  const int64_t windows = r.no_repeat_ngram > 0 ? u.history_width - r.no_repeat_ngram + 1 : 0;
  u.ban_lists = windows > 0 ? u.beams : 1, u.bans_count = 3 + windows;
  r.longest_prefix = any_of({0, 2});
  u.ranges_wanted = true, u.nodes_wanted = testing::random_int(0, 1) == 1;
  s.trie = {0, 3, 5, 1, 0, 1, 3, 4, 12, 13, 0, 1, 1, -1, 0};  // two nodes, five edges, a stride of 7
  u.trie_edges = 5, r.trie_nodes = 2, r.trie_stride = 7;

  const int64_t beams = u.rows * u.beams, kept = u.steps * u.batch * u.beams;
  for (int64_t b = 0; b < u.batch; ++b) s.prefix_lengths.push_back(testing::random_int(0, 2));
  s.sentences.assign(3 * u.rows, 0);
  for (int64_t i = 0; i < u.rows; ++i) {
    s.sentences[i] = u.batch - 1 - i;
    s.sentences[u.rows + i] = testing::random_int(1, u.steps);
  }
  for (int64_t length = 0; length < u.steps + 2; ++length) s.norms.push_back(length == 0 ? 1.0f : length / 2.0f);
  const int64_t finished = u.batch * groups * u.capacity;
  s.chosen.assign(2 * beams, 0), s.totals.assign((1 + u.ranked) * beams, 0.0f);
  s.flags.assign(2 * u.rows * groups, 0), s.progress.assign(u.batch + 1, 0);
  s.finished_ids.assign(3 * finished, -1), s.finished_totals.assign(2 * finished, -kInfinity);
  s.lattice_ids.assign(2 * kept, 0), s.lattice_totals.assign((1 + u.ranked) * kept, 0.0f);
  s.bans.assign(u.rows * u.ban_lists * u.bans_count, -7), s.ranges.assign(2 * beams, -7);
  s.history.assign(2 * beams * u.history_width, 9), s.nodes.assign(2 * beams, 0);
  return s;
}

struct Found {
  std::vector<float> ranks, sums;
  std::vector<int64_t> parents, tokens;

  explicit Found(const Update& u) {
    const int64_t k = u.beams / u.groups;
    for (int64_t group = 0; group < u.rows * u.groups; ++group) {
      std::vector<float> of_group(u.candidates);
      for (float& rank : of_group) rank = static_cast<float>(-testing::random_int(0, 20)) / 4;
      std::sort(of_group.begin(), of_group.end(), std::greater<>());
      for (int64_t c = testing::random_int(0, 2 * u.candidates); c < u.candidates; ++c) of_group[c] = -kInfinity;
      for (float rank : of_group) {
        ranks.push_back(rank);
        sums.push_back(u.ranked ? rank - 1 : rank);
        parents.push_back(group % u.groups * k + testing::random_int(0, k - 1));
        tokens.push_back(testing::random_int(1, 8));
      }
    }
  }

  Update in(Update u) const {
    u.found_ranks = ranks.data(), u.found_sums = sums.data();
    u.found_parents = parents.data(), u.found_tokens = tokens.data();
    return u;
  }
};

}  // namespace

TEST(beam_update_of_a_warp) {
  for (int trial = 0; trial < 400; ++trial) {
    Search alone = random_search(), warp = alone;
    for (int64_t step = 0; step < alone.u.steps + 1; ++step) {  // one too many: nothing is written
      const Found found(alone.u);
      const Update of_one = found.in(alone.update()), of_warp = found.in(warp.update());
      for (int64_t row = 0; row < alone.u.rows; ++row) Sentence<Alone>(of_one, row, Alone{}).update();
      warp_emulation::launch(alone.u.rows, [&] { beam_update_kernel(of_warp); });
      CHECK(warp.same_as(alone));
    }
    CHECK(*std::max_element(alone.sentences.begin() + 2 * alone.u.rows, alone.sentences.end()) == alone.u.steps);
  }
}

// Numbers that a GPU cannot refuse are taken for the nearest that are possible.
TEST(beam_update_of_wrong_numbers) {
  const auto wrong = [] { return any_of({-5, -1, 1000, int64_t{1} << 40}); };
  for (int trial = 0; trial < 200; ++trial) {
    Search broken = random_search(), mended;
    Update& u = broken.u;
    for (int64_t i = 0; i < 3 * u.rows; ++i) {
      if (testing::random_int(0, 2) == 0) broken.sentences[i] = wrong();
    }
    for (int64_t& node : broken.nodes) {
      if (testing::random_int(0, 2) == 0) node = any_of({2, 1000, int64_t{1} << 40});
    }
    Found found(u), found_mended = found;
    for (int64_t& parent : found.parents) {
      if (testing::random_int(0, 2) == 0) parent = wrong();
    }
    mended = broken, found_mended.parents = found.parents;
    const int64_t most[3] = {u.batch - 1, u.steps + 1, u.steps};
    for (int64_t i = 0; i < 3 * u.rows; ++i) {
      mended.sentences[i] = std::clamp<int64_t>(broken.sentences[i], 0, most[i / u.rows]);
    }
    for (int64_t& parent : found_mended.parents) parent = std::clamp<int64_t>(parent, 0, u.beams - 1);
    for (int64_t& node : mended.nodes) node = std::min<int64_t>(node, u.rules.trie_nodes - 1);
    const Update of_broken = found.in(broken.update()), of_mended = found_mended.in(mended.update());
    for (int64_t row = 0; row < u.rows; ++row) Sentence<Alone>(of_mended, row, Alone{}).update();
    warp_emulation::launch(u.rows, [&] { beam_update_kernel(of_broken); });
    CHECK(broken.chosen == mended.chosen && broken.totals == mended.totals && broken.progress == mended.progress);
    CHECK(broken.lattice_ids == mended.lattice_ids && broken.finished_ids == mended.finished_ids);
    CHECK(broken.ranges == mended.ranges && broken.history == mended.history && broken.bans == mended.bans);
  }
}

TEST(beam_hypotheses_of_a_warp) {
  for (const auto& [batch, count] : {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {9, 7}}) {
    Finished f{};
    f.steps = 6, f.batch = batch, f.beams = 4, f.count = count, f.pad_id = 0;
    const int64_t all = batch * count, kept = f.steps * batch * f.beams;
    std::vector<int64_t> ends{1}, finished(3 * all), tokens(kept), parents(kept);
    std::vector<float> sums(all), totals(kept);
    for (int64_t i = 0; i < all; ++i) {
      finished[i] = testing::random_int(0, 3), finished[all + i] = testing::random_int(-1, 3);
      finished[2 * all + i] = testing::random_int(1, 6), sums[i] = testing::random_normal();
    }
    for (int64_t i = 0; i < kept; ++i) {
      tokens[i] = testing::random_int(2, 9), parents[i] = testing::random_int(0, 3),
      totals[i] = testing::random_normal();
    }
    f.ends_count = 1, f.ends = ends.data(), f.finished = finished.data(), f.sums = sums.data();
    f.tokens = tokens.data(), f.parents = parents.data(), f.totals = totals.data();
    std::vector<std::vector<int64_t>> ids[2];
    std::vector<float> log_probs[2];
    for (int warp = 0; warp < 2; ++warp) {
      ids[warp] = {std::vector<int64_t>(all * f.steps, -9), std::vector<int64_t>(all, -9)};
      log_probs[warp].assign(all * (f.steps + 1), NAN);
      f.out_tokens = ids[warp][0].data(), f.out_lengths = ids[warp][1].data(), f.out_log_probs = log_probs[warp].data();
      if (warp == 1) {
        warp_emulation::launch((all + 31) / 32, [&] { beam_hypotheses_kernel(f); });
      } else {
        for (int64_t i = 0; i < all; ++i) trace_back(f, i);
      }
    }
    CHECK(ids[0] == ids[1] && log_probs[0] == log_probs[1]);  // and nothing is NaN
  }
}

TEST(beam_hypotheses_of_wrong_numbers) {
  Finished f{};
  f.steps = 3, f.batch = 1, f.beams = 2, f.count = 1, f.pad_id = 0;
  const std::vector<int64_t> tokens{4, 5, 6, 7, 8, 9}, ends{1};
  const std::vector<float> sums{-5.0f}, totals{-1, -2, -3, -4, -5, -6};
  f.ends_count = 1, f.ends = ends.data(), f.tokens = tokens.data(), f.totals = totals.data(), f.sums = sums.data();
  const auto follow = [&](int64_t slot, int64_t length, int64_t parent, bool in_range) {
    const std::vector<int64_t> finished{slot, 3, length}, parents(6, parent);
    f.finished = finished.data(), f.parents = parents.data();
    std::vector<int64_t> ids(3 + 2, -9), lengths(1);
    std::vector<float> log_probs(4 + 2, NAN);
    f.out_tokens = ids.data() + 1, f.out_lengths = lengths.data(), f.out_log_probs = log_probs.data() + 1;
    CHECK(trace_back(f, 0) == in_range);
    CHECK(ids.front() == -9 && ids.back() == -9 && log_probs.front() != log_probs.front());
    CHECK(log_probs.back() != log_probs.back());
    return std::vector<int64_t>(ids.begin() + 1, ids.end() - 1);
  };
  const int64_t far = int64_t{1} << 40;
  CHECK(follow(1, 3, 0, true) == (std::vector<int64_t>{4, 7, 3}));
  for (int64_t slot : {int64_t{2}, far}) CHECK(follow(slot, 3, 0, false) == (std::vector<int64_t>{4, 7, 3}));
  for (int64_t slot : {int64_t{-1}, -far}) CHECK(follow(slot, 3, 1, false) == (std::vector<int64_t>{5, 6, 3}));
  for (int64_t parent : {int64_t{2}, far}) CHECK(follow(1, 3, parent, false) == (std::vector<int64_t>{5, 7, 3}));
  for (int64_t length : {int64_t{4}, far}) CHECK(follow(1, length, 0, false) == (std::vector<int64_t>{4, 7, 3}));
  for (int64_t length : {int64_t{0}, -far}) CHECK(follow(1, length, 0, false) == (std::vector<int64_t>{3, 0, 0}));
}

}  // namespace condgen_fast::beam_search
