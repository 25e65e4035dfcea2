#!lua flags=no-writes
-- What stands in the queues of one partition. Changes nothing.
-- KEYS: the list of queues. ARGV: the prefix of its keys, one past the last moment that is due
-- (eight bytes; none: the server's time), the first bound of the list, how many queues.
-- Answers a list of {queue and rank, record of a batch, recipients due, the moment of the next,
-- the batch}.
local call, prefix, upto = redis.call, ARGV[1], ARGV[2]
if upto == '' then
  local time = call('TIME')
  upto = struct.pack('>I8', time[1] * 1000 + math.floor(time[2] / 1000) + 1)
end
local answer = {}

for _, name in ipairs(call('ZRANGEBYLEX', KEYS[1], ARGV[3], '+', 'LIMIT', 0, ARGV[4])) do
  local queue, rank = string.match(name, '^(.*)%z(.)$')
  local key, from = prefix .. 'q' .. rank .. ':' .. queue, '-'
  while true do
    local first = call('ZRANGEBYLEX', key, from, '+', 'LIMIT', 0, 1)[1]
    if not first then break end
    local batch = string.sub(first, 1, 26)
    local record = call('GET', prefix .. 'b:' .. batch)
    if record then
      local due, next = 0, ''
      for _, member in ipairs(call('ZRANGEBYLEX', key, '[' .. batch, '(' .. batch .. upto, 'LIMIT', 0, 512)) do
        due = due + string.byte(member, 51) % 128 * 256 + string.byte(member, 52)
      end
      -- What is held is its holder's: the next is the first that nobody holds.
      for _, member in ipairs(call('ZRANGEBYLEX', key, '[' .. batch .. upto, '(' .. batch .. '\255', 'LIMIT', 0, 512)) do
        if string.byte(member, 51) < 128 then
          next = string.sub(member, 27, 34)
          break
        end
      end
      answer[#answer + 1] = {name, record, due, next, batch}
    end
    from = '(' .. batch .. '\255'
  end
end
return answer
