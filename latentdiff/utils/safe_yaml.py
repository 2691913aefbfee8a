"""Safe YAML loading: no Python objects, and a size limit against alias bombs."""

from typing import Any

import yaml

MAX_YAML = 100_000  # values


def read_yaml(text: str) -> Any:
    """The value of a YAML text: mappings, lists, strings, numbers, dates; no tag makes a Python object.

    Aliases count as the values that they stand for: a few lines of them can stand for more than any memory holds.

    Raises:
        yaml.YAMLError: bad YAML, a value nested in itself or too deeply, or more than MAX_YAML values.
    """
    loader = yaml.SafeLoader(text)
    sizes: dict[yaml.Node, float] = {}

    def size(node: yaml.Node) -> float:
        if node not in sizes:
            sizes[node] = float("inf")  # while it is being counted, so that a node within itself never ends
            parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            sizes[node] = 1 + (len(node.value) / 64 if isinstance(node.value, str) else sum(map(size, parts)))
        return sizes[node]

    try:
        node = loader.get_single_node()
        if node is not None and size(node) > MAX_YAML:
            raise yaml.YAMLError(f"its aliases stand for more than {MAX_YAML} values")
        return None if node is None else loader.construct_document(node)
    except (ValueError, RecursionError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # The constructors of dates and numbers raise these
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error
    finally:
        loader.dispose()
