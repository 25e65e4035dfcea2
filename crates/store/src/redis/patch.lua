#!lua
-- Puts entries of six bytes into a piece of an index map, in which others may stand already.
-- KEYS: the map. ARGV: the number of the piece, the entries from its beginning; all ones: none.
local none = string.rep('\255', 6)
local old, new = redis.call('HGET', KEYS[1], ARGV[1]) or '', ARGV[2]
if #old < #new then old = old .. string.rep('\255', #new - #old) end
local entries = {}
for at = 1, #new, 6 do
  local entry = string.sub(new, at, at + 5)
  if entry == none then entry = string.sub(old, at, at + 5) end
  entries[#entries + 1] = entry
end
entries[#entries + 1] = string.sub(old, #new + 1)
redis.call('HSET', KEYS[1], ARGV[1], table.concat(entries))
return 1
