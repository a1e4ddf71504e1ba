"""Search: trees of texts whose nodes share the blocks of their common tokens.

Pipeline: prompts -> [search] -> block manager, decoder -> values -> texts.

`tree` has the arithmetic of Monte Carlo tree search, without a model. `pages` stores
each node's keys and values in the pool: a node is a row of block tables, created by one
`fork` of its parent and one `append`. `loop` runs a search as one program. A decoding
algorithm cannot do this, because its rows decode in lockstep, and a search returns to
nodes of different lengths.
"""

from jpaged.decoding.values import Leaf as Leaf
from jpaged.decoding.values import mean_logprob as mean_logprob
from jpaged.search.loop import Found as Found
from jpaged.search.loop import SearchRequests as SearchRequests
from jpaged.search.loop import SearchSizes as SearchSizes
from jpaged.search.loop import search as search
from jpaged.search.params import TreeSearchParams as TreeSearchParams
from jpaged.search.tree import Tree as Tree
