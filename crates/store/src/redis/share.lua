#!lua
-- What a node has of limits that all nodes keep together. Nobody is given what another still has:
-- who is to have less has it from his next claim on, and only then the others have more.
-- KEYS: one key of the partition. ARGV: the prefix of its keys, the time in milliseconds (none: the
-- server's), for how long, the node, then per claim: the limit, how many connections it allows,
-- how many permits its rate has (0: it is divided at will), whether it is wanted.
-- Answers per claim {millionths of the rate, connections, nodes}.
local call, prefix, lasts, node = redis.call, ARGV[1], tonumber(ARGV[3]), ARGV[4]
local now, whole = tonumber(ARGV[2]), 1000000
if not now then
  local time = call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local answer = {}
for at = 5, #ARGV, 4 do
  local key, most, wanted = prefix .. 'lim:' .. ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 3] == '1'
  local permits = tonumber(ARGV[at + 2])
  local stored, nodes, rate, open = call('HGETALL', key), {}, 0, 0
  for each = 1, #stored, 2 do
    local expires, parts, conns = string.match(stored[each + 1], '^(%d+) (%d+) (%d+)$')
    if not expires or tonumber(expires) <= now then
      call('HDEL', key, stored[each])
    elseif stored[each] ~= node then
      nodes[#nodes + 1] = stored[each]
      rate, open = rate + parts, open + conns
    end
  end
  local parts, conns = 0, 0
  if wanted then
    nodes[#nodes + 1] = node
    table.sort(nodes)
    -- Where there are fewer connections or permits than nodes, the first have one each, and all of
    -- the rate.
    local able, rank = math.min(#nodes, most), 0
    if permits > 0 then able = math.min(able, permits) end
    for each, name in ipairs(nodes) do
      if name == node then rank = each end
    end
    if rank <= able then
      parts = math.floor(whole / able)
      if permits > 0 then
        local mine = math.floor(permits / able)
        if rank <= permits % able then mine = mine + 1 end
        parts = math.floor(whole * mine / permits)
      end
      conns = math.floor(most / able)
      if rank <= most % able then conns = conns + 1 end
    end
    parts = math.max(0, math.min(parts, whole - rate))
    conns = math.max(0, math.min(conns, most - open))
    call('HSET', key, node, string.format('%.0f %.0f %.0f', now + lasts, parts, conns))
    call('PEXPIRE', key, lasts)
  else
    call('HDEL', key, node)
  end
  answer[#answer + 1] = {parts, conns, #nodes}
end
return answer
