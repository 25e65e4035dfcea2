#!lua
-- Takes events of a person out of a stream.
-- KEYS: the stream. ARGV: the id after which to look, how many, what says whose (account), what says
-- who (address, lower case). Answers {the last id looked at or '', how many were removed}.
local key, last, gone = KEYS[1], '', 0
for _, entry in ipairs(redis.call('XRANGE', key, '(' .. ARGV[1], '+', 'COUNT', ARGV[2])) do
  local event = entry[2][2]
  last = entry[1]
  if string.find(event, ARGV[3], 1, true) and string.find(string.lower(event), ARGV[4], 1, true) then
    gone = gone + redis.call('XDEL', key, last)
  end
end
return {last, gone}
