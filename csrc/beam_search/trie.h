// The tree of the common beginnings of token sequences, which condgen_fast.decode.Trie lays out for the device.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace condgen_fast::beam_search {

struct Trie {
  std::vector<int64_t> parents, tokens;  // of each edge; edge e leads to node e + 1
  std::vector<int64_t> finals;           // nodes that a sequence ends at

  explicit Trie(const std::vector<std::vector<int64_t>>& sequences) {
    if (sequences.empty()) throw std::invalid_argument("sequences must hold at least one sequence; got none");
    std::map<std::pair<int64_t, int64_t>, int64_t> children;  // (node, token) -> node
    std::vector<bool> is_final(1, false);
    for (const std::vector<int64_t>& sequence : sequences) {
      if (sequence.empty()) throw std::invalid_argument("sequences must not hold an empty sequence");
      int64_t node = 0;
      for (int64_t token : sequence) {
        if (token < 0) throw std::invalid_argument("sequences must hold ids >= 0; got " + std::to_string(token));
        const auto [place, is_new] = children.try_emplace({node, token}, static_cast<int64_t>(tokens.size()) + 1);
        if (is_new) {
          parents.push_back(node);
          tokens.push_back(token);
          is_final.push_back(false);
        }
        node = place->second;
      }
      if (!is_final[node]) finals.push_back(node);
      is_final[node] = true;
    }
  }
};

}  // namespace condgen_fast::beam_search
