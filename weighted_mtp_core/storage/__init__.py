"""Store versions of models and data sets with checksums, write files atomically, and upload to S3."""
