-- A scheduler says that it admits an inbox into a dataset. Any number may, into one dataset.
-- KEYS[1]  prefix of the namespace
-- ARGV     name of the inbox, id of the dataset, where the dataset is, for how long a word counts in ms
-- reply    empty, or where the other dataset is that it is admitted into
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
-- A full server, too, takes what is written behind a first write that needs no memory.
redis.call('HDEL', KEYS[1] .. ':inboxes', '')
local known = redis.call('HGET', KEYS[1] .. ':inboxes', ARGV[1])
local at_ms, dataset_id, dataset = string.match(known or '', '^(%d+) (%S+) (.*)$')
if dataset_id and dataset_id ~= ARGV[2] and now_ms - tonumber(at_ms) < tonumber(ARGV[4]) then
  return dataset
end
redis.call('HSET', KEYS[1] .. ':inboxes', ARGV[1], string.format('%.0f %s %s', now_ms, ARGV[2], ARGV[3]))
return ''
