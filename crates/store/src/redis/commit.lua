#!lua
-- One step in one partition: every check holds and every write is done, or nothing is.
-- KEYS: the generation, then the keys, named below by number. ARGV: the generation, the number of
-- checks, the checks, the writes.
-- Answers {1, last event number, what each count left open ...}, {0, the key that had changed}, {2}
-- on another store than the one that was opened, {3, milliseconds} while nothing is leased, or {4}
-- where events beside it need other numbers.
local call, at = redis.call, 3
if call('GET', KEYS[1]) ~= ARGV[1] then return {2} end
local function take()
  local value = ARGV[at]
  at = at + 1
  return value
end

for _ = 1, tonumber(ARGV[2]) do
  local kind, key = take(), KEYS[tonumber(take())]
  if kind == 'V' then
    -- The version, or nothing where there must be nothing.
    if call('GETRANGE', key, 0, 7) ~= take() then return {0, key} end
  elseif kind == 'P' then
    -- The primary is still the one that has all leases, or they have run out since.
    local lasts = tonumber(take())
    local id = string.match(call('INFO', 'replication'), 'master_replid:(%x+)') or ''
    local known, quiet = string.match(call('GET', key) or '', '^(%x*) (%d+)$')
    local time = call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    if known ~= id then
      call('SET', key, id .. ' ' .. string.format('%d', now + lasts))
      return {3, lasts}
    end
    if tonumber(quiet) > now then return {3, tonumber(quiet) - now} end
  elseif kind == 'N' then
    -- What is added beside this script is numbered from here on, unless others' events have come since.
    local floor, first = tonumber(take()), tonumber(take())
    if math.max(tonumber(call('GET', key) or '0'), floor) >= first then return {4} end
  elseif kind == 'B' then
    -- Some bytes from some place on.
    local from, expected = take(), take()
    if call('GETRANGE', key, from, from + #expected - 1) ~= expected then return {0, key} end
  else
    -- A field of a hash, or nothing.
    local field, expected = take(), take()
    if (call('HGET', key, field) or '') ~= expected then return {0, key} end
  end
end

local answer = {1, '0'}
while ARGV[at] do
  local kind, key = take(), KEYS[tonumber(take())]
  if kind == 'R' then
    -- A command as it is.
    local name, count = take(), tonumber(take())
    call(name, key, unpack(ARGV, at, at + count - 1))
    at = at + count
  elseif kind == 'E' then
    -- Events: numbered from `first` on, unless other events have come since that was the time. Then
    -- each gets another number of as many digits, behind the id, which has a fixed length.
    local counter, floor = KEYS[tonumber(take())], tonumber(take())
    local first, count = tonumber(take()), tonumber(take())
    local last = math.max(tonumber(call('GET', counter) or '0'), floor)
    if first > last then
      for number = first, first + count - 1 do
        call('XADD', key, string.format('%d-0', number), 'e', take())
      end
      last = first + count - 1
    else
      local time = call('TIME')
      last = math.max(last, time[1] * 1000000 + time[2] - 1)
      for _ = 1, count do
        local event = take()
        last = last + 1
        local number = string.format('%d', last)
        call('XADD', key, number .. '-0', 'e', string.sub(event, 1, 51) .. number .. string.sub(event, 68))
      end
    end
    answer[2] = string.format('%d', last)
    call('SET', counter, answer[2])
  elseif kind == 'C' then
    -- Control items: numbered without gaps; what is too old goes, up to the first that is not.
    local counter, now, oldest, count = KEYS[tonumber(take())], take(), tonumber(take()), tonumber(take())
    local trim = false
    for _ = 1, count do
      local number = call('INCR', counter)
      call('XADD', key, number .. '-0', 't', now, 'i', take())
      trim = trim or number % 64 == 0
    end
    while trim do
      local first = call('XRANGE', key, '-', '+', 'COUNT', 256)
      trim = #first == 256
      for _, item in ipairs(first) do
        if tonumber(item[2][2]) >= oldest then
          trim = false
          break
        end
        call('XDEL', key, item[1])
      end
    end
  elseif kind == 'Q' then
    -- A queue is listed as long as something stands in it.
    local list, name = KEYS[tonumber(take())], take()
    if call('EXISTS', key) == 1 then call('ZADD', list, 0, name) else call('ZREM', list, name) end
  elseif kind == 'K' then
    -- Counters move; asked to, tells how many recipients are open.
    local tell, count = take(), tonumber(take())
    for _ = 1, count do
      local field = take()
      call('HINCRBY', key, field, take())
    end
    if tell == '1' then
      local open = 0
      for _, value in ipairs(call('HMGET', key, 'scheduled', 'queued', 'temporary_error')) do
        open = open + tonumber(value or '0')
      end
      answer[#answer + 1] = open
    end
  else
    -- What was scheduled is queued.
    local waiting = call('HGET', key, 'scheduled')
    if waiting then
      call('HDEL', key, 'scheduled')
      call('HINCRBY', key, 'queued', waiting)
    end
  end
end
return answer
