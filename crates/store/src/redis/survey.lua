#!lua flags=no-writes
-- What stands in the queues of one partition. Changes nothing.
-- KEYS: the list of queues. ARGV: the prefix of its keys, one past the last moment that is due
-- (eight bytes; none: the server's time), the first bound of the list, how many queues.
-- Answers a list of {queue and rank, record of a batch, recipients due, the moment of the next,
-- the batch}.
local call, prefix, upto = redis.call, ARGV[1], ARGV[2]
-- Ranges that are read at once, and of one batch: of a giant it is enough to know that it is one.
local page, most = 64, 1024
if upto == '' then
  local time = call('TIME')
  upto = time[1] * 1000 + math.floor(time[2] / 1000) + 1
else
  upto = struct.unpack('>I8', upto)
end
local answer, records = {}, {}

local function record_of(batch)
  if records[batch] == nil then records[batch] = call('GET', prefix .. 'b:' .. batch) end
  return records[batch]
end

for _, name in ipairs(call('ZRANGEBYLEX', KEYS[1], ARGV[3], '+', 'LIMIT', 0, ARGV[4])) do
  local queue, rank = string.match(name, '^(.*)%z(.)$')
  local key, from = prefix .. 'q' .. rank .. ':' .. queue, '-'
  -- What is told of the batch at hand; its ranges stand together.
  local batch, told, seen
  repeat
    local some = call('ZRANGEBYLEX', key, from, '+', 'LIMIT', 0, page)
    local more = #some == page
    for _, member in ipairs(some) do
      from = '(' .. member
      local of = string.sub(member, 1, 26)
      if of ~= batch then
        batch, told, seen = of, {name, record_of(of), 0, '', of}, 0
        if told[2] then answer[#answer + 1] = told end
      end
      if struct.unpack('>I8', member, 27) < upto then
        told[3] = told[3] + string.byte(member, 51) % 128 * 256 + string.byte(member, 52)
      elseif told[4] == '' and string.byte(member, 51) < 128 then
        -- What is held is its holder's: the next is the first that nobody holds.
        told[4] = string.sub(member, 27, 34)
      end
      seen = seen + 1
      if seen == most then
        from, more = '(' .. batch .. '\255', true
        break
      end
    end
  until not more
end
return answer
