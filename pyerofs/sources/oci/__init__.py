"""OCI registries and layouts: references, manifests, blobs, layers that are one zstd stream."""
