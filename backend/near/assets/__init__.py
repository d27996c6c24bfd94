"""The relightable asset: data, file format, store."""

from near.assets.format import decode_asset, encode_asset, load_asset, save_asset
from near.assets.inspect import inspect_asset
from near.assets.published import import_npz
from near.assets.store import AssetStore
from near.assets.types import Anchors, Asset

__all__ = ["Anchors", "Asset", "AssetStore", "decode_asset", "encode_asset", "import_npz", "inspect_asset", "load_asset", "save_asset"]
