-- Which inboxes schedulers admit or did, and what waits in each.
-- KEYS[1]  prefix of the namespace
-- reply    per inbox: name, messages that wait, id of the dataset and where it is, ms since a scheduler last said so
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local found = {}
local known = redis.call('HGETALL', KEYS[1] .. ':inboxes')
for i = 1, #known, 2 do
  local at_ms, dataset_id, dataset = string.match(known[i + 1], '^(%d+) (%S+) (.*)$')
  local waiting = redis.call('XLEN', KEYS[1] .. ':inbox:' .. known[i])
  found[#found + 1] = { known[i], waiting, dataset_id, dataset, math.max(0, now_ms - tonumber(at_ms)) }
end
return found
