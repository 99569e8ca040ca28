"""From messages to token ids, rows and batches; and which bytes each token covers."""
