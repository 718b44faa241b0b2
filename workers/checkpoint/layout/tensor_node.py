"""The node of a leaf whose tensor is more than its values: a parameter, one that requires grad, one with attributes.

    ["tensor", node, flags]           node: the leaf's item, or its chunks; it lies where it would lie without flags
    ["tensor", node, flags, recipe]   recipe: the item of a pickled tuple, which is a leaf beside it (``recipe_path``)

    flags     "parameter": true       an ``nn.Parameter``
              "requires_grad": true
              "object": number        of the leaves that name one item, those of one number are one tensor object. Leaves
                                      without it are tensor objects of their own, over one memory (tied weights)
              "stride": [step, ...]   of a tensor that the format stores in C order
    recipe    (the tensor's class, or None if flags tell; its attributes, as ``__getstate__`` returns them)

Only leaves that need it have such a node. Key paths and names, and so other readers of the format, do not see it.
In a rank's save record, the node or the recipe may be absent; if both are, the whole leaf is absent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_KINDS: dict[str, type] = {"parameter": bool, "requires_grad": bool, "object": int, "stride": list}


class TensorNode(NamedTuple):
    """A tensor node, taken apart.

    Attributes:
        node: the leaf itself.
        flags: see the head of this file.
        recipes: the item of the recipe, if there is one.
    """

    node: Any
    flags: dict[str, Any]
    recipes: list[Any]

    def to_node(self) -> Any:
        """Return the node of the structure: the leaf itself, if nothing is to be said of it."""
        inner, flags, recipes = self
        if is_tensor_node(inner):
            inner, more, others = open_tensor(inner)
            flags, recipes = {**more, **flags}, [*others, *recipes]
        if inner is None and not any(recipe is not None for recipe in recipes):
            return None
        return ["tensor", inner, flags, *recipes] if flags or recipes else inner


def is_tensor_node(node: Any) -> bool:
    """Tell whether a node is one of a tensor with flags."""
    return isinstance(node, list) and node[:1] == ["tensor"]


def open_tensor(node: Any) -> TensorNode:
    """Take a tensor node apart; any other node is a leaf without flags.

    Raises:
        ValueError: it is malformed.
    """
    if not is_tensor_node(node):
        return TensorNode(node, {}, [])
    match node:
        case [_, inner, dict(flags), *recipes] if len(recipes) <= 1:
            is_leaf = inner is None or type(inner) is int or (isinstance(inner, list) and inner[:1] == ["chunks"])
            if is_leaf and all(type(value) is _KINDS.get(name) for name, value in flags.items()):
                if all(recipe is None or type(recipe) is int for recipe in recipes):
                    return TensorNode(inner, flags, recipes)
    raise ValueError(f"the structure of the state has a malformed tensor: {str(node)[:60]}")


def without_flags(node: Any) -> Any:
    """Return a structure whose tensors are nothing but their values: what is restored in place."""
    if is_tensor_node(node):
        return node[1]
    if not isinstance(node, list) or node[0] == "chunks":
        return node
    position = 1 if node[0] == "list" else 2
    return [*node[:position], list(map(without_flags, node[position])), *node[position + 1 :]]
