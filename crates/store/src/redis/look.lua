#!lua flags=no-writes
-- Candidates for a lease in one partition. Changes nothing.
-- KEYS: one key of the partition. ARGV: the prefix of its keys, one past the last moment that is due
-- (eight bytes; none: the server's time), the state that leaves, then per wish: queue, rank, rows,
-- batches, turn.
-- Answers {seconds, microseconds, version of the suppressions, how many there are, then per wish
-- a list of {batch, its record, range, range ...}}.
local call, prefix, upto, leaving = redis.call, ARGV[1], ARGV[2], ARGV[3]
local time = call('TIME')
if upto == '' then upto = struct.pack('>I8', time[1] * 1000 + math.floor(time[2] / 1000) + 1) end
local answer = {time[1], time[2], call('GET', prefix .. 'sv') or '', call('SCARD', prefix .. 'sh')}

-- Ranges of a batch that are due, until `rows` are found.
local function ranges(key, batch, rows, found)
  local from = '[' .. batch
  while rows > 0 do
    local some = call('ZRANGEBYLEX', key, from, '(' .. batch .. upto, 'LIMIT', 0, 64)
    for _, member in ipairs(some) do
      local id = string.sub(member, 35, 50)
      local range = call('GET', prefix .. 'w:' .. id)
      if range then found[#found + 1] = range end
      rows = rows - (string.byte(member, 51) % 128 * 256 + string.byte(member, 52))
      if rows <= 0 then return end
      from = '(' .. member
    end
    if #some < 64 then return end
  end
end

for at = 4, #ARGV, 5 do
  local key = prefix .. 'q' .. ARGV[at + 1] .. ':' .. ARGV[at]
  local rows, most, turn, found = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3]), ARGV[at + 4], {}
  -- From the turn to the end, then from the beginning to the turn.
  local parts = {{'(' .. turn .. '\255', '+'}, {'-', '(' .. turn .. '\255'}}
  if turn == '' then parts = {{'-', '+'}} end
  for _, part in ipairs(parts) do
    local from = part[1]
    while #found < most do
      local first = call('ZRANGEBYLEX', key, from, part[2], 'LIMIT', 0, 1)[1]
      if not first then break end
      local batch = string.sub(first, 1, 26)
      local record = call('GET', prefix .. 'b:' .. batch)
      if record and string.sub(record, 10, 10) == leaving then
        local due = {batch, record}
        ranges(key, batch, rows, due)
        if #due > 2 then found[#found + 1] = due end
      end
      from = '(' .. batch .. '\255'
    end
  end
  answer[#answer + 1] = found
end
return answer
