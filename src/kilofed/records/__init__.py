"""What a run writes into its folder, as frozen dataclasses: results.json and the lines of metrics.jsonl."""
