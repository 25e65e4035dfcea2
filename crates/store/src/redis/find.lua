#!lua flags=no-writes
-- Lots that may have an address: those whose hashes have this one at a place of four bytes.
-- KEYS: lots. ARGV: the hash, the bytes of a lot's head. Answers the numbers of the keys.
local found = {}
for at, key in ipairs(KEYS) do
  local head = redis.call('GETRANGE', key, 0, 3)
  local rows = #head == 4 and string.byte(head, 2) + string.byte(head, 3) * 256 or 0
  local hashes = rows > 0 and redis.call('GETRANGE', key, 4, 3 + rows * 4) or ''
  local from = 1
  while true do
    local place = string.find(hashes, ARGV[1], from, true)
    if not place then break end
    if place % 4 == 1 then
      found[#found + 1] = at
      break
    end
    from = place + 1
  end
end
return found
