#!lua
-- Removes old events of one partition, but none that a consumer group has not read and acknowledged.
-- KEYS: the stream. ARGV: the first number that stays, how many entries to look at.
-- Answers how many are removed, and whether that was all.
local call, key, floor, limit = redis.call, KEYS[1], tonumber(ARGV[1]), ARGV[2]
if call('EXISTS', key) == 0 then return {0, 1} end
local function number(id) return tonumber(string.match(id, '^%d+')) end

for _, group in ipairs(call('XINFO', 'GROUPS', key)) do
  local of = {}
  for at = 1, #group, 2 do of[group[at]] = group[at + 1] end
  floor = math.min(floor, number(of['last-delivered-id']) + 1)
  if of['pending'] > 0 then floor = math.min(floor, number(call('XPENDING', key, of['name'])[2])) end
end
floor = string.format('%.0f', floor)
-- Whole nodes of the stream first, so that a step is short; the last one entry by entry.
local gone = call('XTRIM', key, 'MINID', '~', floor, 'LIMIT', limit)
if gone > 0 then return {gone, 0} end
return {call('XTRIM', key, 'MINID', '=', floor), 1}
