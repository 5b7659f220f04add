"""What ComfyUI reads of a folder in ``custom_nodes``: the nodes, by id and by the name that a user sees."""

from .tokentrim_comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
