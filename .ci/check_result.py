"""Check the JSON document of the README's main command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

result = json.loads(Path(sys.argv[1]).read_text())
kept = result["best"]["macs"] / result["dense"]["macs"]
print(
    f"MACs kept {kept:.4f}, test accuracy {result['best']['test_accuracy']:.4f} "
    f"(dense {result['dense']['test_accuracy']:.4f}), {result['seconds']:.0f} s"
)
if kept > 0.3 or len(result["trials"]) != 40 or not Path(result["artifact"]).is_file():
    sys.exit("the main command did not do what it promises")
