"""Write docs/results.schema.json, the JSON Schema of results.json, from the dataclasses of kilofed.records.results."""

import json
from pathlib import Path

from kilofed.records import codec
from kilofed.records.results import Results

TARGET = Path(__file__).parents[1] / "docs" / "results.schema.json"

if __name__ == "__main__":
    TARGET.write_text(json.dumps(codec.schema(Results), indent=1) + "\n", "utf-8")
    print(TARGET)
