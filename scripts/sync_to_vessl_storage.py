"""Upload models and data sets to S3, as the command `python -m weighted_mtp_core storage sync` does.

Existing jobs call this file:  python scripts/sync_to_vessl_storage.py --to s3://bucket/storage
"""

import sys

from weighted_mtp_core.cli import main

if __name__ == "__main__":
    sys.exit(main(["storage", "sync", *sys.argv[1:]]))
