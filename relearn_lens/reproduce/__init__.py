"""The field's claims put to the test in minutes: one file per paper, made of the rest of the library alone.

`claims.py` holds every claim and its bar, `protocol.py` runs a paper over seeds and gives the verdicts, `tables.py`
writes them down.
"""

import lazy_loader as lazy

# The public names, by module; heavy ones are imported when used.
__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "claims": ["CLAIMS", "Claim", "verdict_of"],
        "protocol": ["PAPERS", "Lab", "Paper", "Reading", "Reproduction", "gathered", "reproduce", "spread"],
        "tables": ["record", "table"],
    },
)
