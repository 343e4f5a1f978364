"""Text, subword vocabulary, batches, corpora, and the store of a distilled corpus."""
